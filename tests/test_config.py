"""The configuration file: good ones, and one sentence for each bad one."""

from pathlib import Path

import pytest

from lorafold.config import Config, EngineConfig, load_config, local_model_path
from lorafold.errors import ConfigError
from lorafold.recipes import Recipe, RecipePart
from lorafold_adapters.compose import Composition
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


def composed(options: str, parts: str = '{ adapter = "x" }') -> str:
    return f'[base]\nmodel = "m"\n[[deployments]]\nname = "a"\ncompose = {{ {options}, parts = [{parts}] }}'


def test_a_deployment_may_be_a_composition(tmp_path: Path) -> None:
    parts = '{ adapter = "x" }, { adapter = "y", weight = -0.5 }'
    config = load_config(write(tmp_path, composed('method = "dare_ties", density = 1, seed = 3', parts)))
    assert config.deployments[0].source == Recipe(
        spec=Composition(method="dare_ties", density=1.0, seed=3),
        parts=(RecipePart(path="x", weight=1.0), RecipePart(path="y", weight=-0.5)),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'base'"),
        ("[base]\nmodel = 3", "base.model"),
        (
            '[base]\nmodel = "m"\nmodle = "n"',
            "'base.modle': no such key: known here are model, dtype, device, quantise",
        ),
        ('[basse]\nmodel = "m"', "'basse': no such key: known here are base, server,"),
        (composed('method = "cat"', '{ adaptor = "x" }'), "parts.0.adaptor': no such key: known here are adapter"),
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
        ('[base]\nmodel = "m"\n[[deployments]]\nname = "a"', "'deployments.0': needs 'adapter' or 'compose'"),
        (
            composed('method = "linear"') + '\nadapter = "y"',
            "'deployments.0': needs 'adapter' or 'compose', and not both",
        ),
        (composed('method = "soup"'), "'deployments.0.compose': 'method' 'soup' is no method"),
        (composed('method = "ties"'), "'density' is missing"),
        (composed('method = "ties", density = 0.0'), "'density' is 0.0"),
        (composed('method = "ties", density = 0.5, seed = 1'), "'seed' 'ties' does not use it"),
        (composed('method = "svd"'), "'rank' is missing"),
        (composed('method = "linear"', ""), "'parts' is empty"),
        (composed('method = "linear"', '{ adapter = "x", weight = nan }'), "'parts[0].weight' is nan"),
        (composed('method = "linear"', "{ weight = 1.0 }"), "deployments.0.compose.parts.0.adapter"),
        (composed('method = "linear", colour = 1'), "deployments.0.compose.colour"),
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
