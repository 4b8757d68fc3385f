"""The configuration file: good ones, and one sentence for each bad one."""

from pathlib import Path

import pytest

from lorafold.config import Config, EngineConfig, load_config, local_model_path
from lorafold.errors import ConfigError
from lorafold_adapters.policy import PolicyKind


def write(folder: Path, text: str) -> Path:
    file = folder / "lorafold.toml"
    file.write_text(text)
    return file


def test_two_lines_are_enough(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, '[base]\nmodel = "some/model"\n'))
    assert config == Config.model_validate({"base": {"model": "some/model"}, "folder": tmp_path})
    assert config.engine == EngineConfig()
    assert local_model_path(config) == "some/model"


def test_a_folder_beside_the_file_wins_over_the_hub(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    config = load_config(write(tmp_path, '[base]\nmodel = "llama"\n'))
    assert local_model_path(config) == str(tmp_path / "llama")


def test_deployments_have_a_policy(tmp_path: Path) -> None:
    text = '[base]\nmodel = "m"\n[[deployments]]\nname = "a"\nadapter = "x"\n'
    text += '[[deployments]]\nname = "b"\nadapter = "x"\npolicy = "merged"\n'
    config = load_config(write(tmp_path, text))
    assert [item.policy for item in config.deployments] == [PolicyKind.AUTO, PolicyKind.MERGED]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'base'"),
        ("[base]\nmodel = 3", "base.model"),
        ('[base]\nmodel = "m"\nmodle = "n"', "base.modle"),
        ('[base]\nmodel = "m"\ndtype = "int3"', "base.dtype"),
        ('[base]\nmodel = "m"\n[engine]\nmax_batch = 0', "engine.max_batch"),
        ('[base]\nmodel = "m"\n[identity]\nunstamped = "ignore"', "identity.unstamped"),
        ('[base]\nmodel = "m"\n[engine]\nmax_batch = "8"', "engine.max_batch"),
        ('[base]\nmodel = "m"\n[[deployments]]\nname = "a b"\nadapter = "x"', "deployments.0.name"),
        ('[base]\nmodel = "m"\n[[deployments]]\nname = "a"\nadapter = "x"\npolicy = "both"', "deployments.0.policy"),
        ('[base]\nmodel = "m"\n[[deployments]]\nname = "base"\nadapter = "x"', "'base'"),
        ('[base]\nmodel = "m"\n' + '[[deployments]]\nname = "a"\nadapter = "x"\n' * 2, "'a' is there twice"),
        ('[base]\nmodel = "m"\n[server]\naddress = "nowhere"', "server.address"),
        ('[base]\nmodel = "m"\n[server]\naddress = "127.0.0.1:99999"', "0 to 65535"),
        ('[base\nmodel = "m"', "not valid TOML"),
        ('folder = "x"\n[base]\nmodel = "m"', "'folder'"),
    ],
)
def test_a_bad_file_is_one_sentence_with_the_key(text: str, words: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "nowhere.toml")
