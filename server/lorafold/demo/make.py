"""Trains the demo set: a Llama of 0.6 M parameters that copies a string, and one PEFT adapter for each task.

Writes ordinary transformers and PEFT folders, stamped: `base/` and one folder per task. Seeded; about twenty minutes on
2 cores, which is why the result is shipped in `set/`.
"""

import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafold.demo.tasks import ALPHABET, TASKS, TRAINED_LENGTHS, Rule, random_text
from lorafold_adapters.checkpoint import read_checkpoint
from lorafold_adapters.identity import fingerprint
from lorafold_adapters.stamp import make_stamp, write_stamp

PAD, BOS, EOS, SEP = "<pad>", "<bos>", "<eos>", "<sep>"
BASE_STEPS, BASE_BATCH, BASE_RATE = 900, 128, 3e-3
ADAPTER_STEPS, ADAPTER_BATCH, ADAPTER_RATE = 400, 64, 5e-3
IGNORED = -100
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}<sep>{% endif %}"


def make_demo_set(folder: Path, *, seed: int = 0, base_steps: int = BASE_STEPS, steps: int = ADAPTER_STEPS) -> None:
    """Trains base and adapters into `folder`, showing a progress bar."""
    with Progress() as progress:
        make_base(folder / "base", seed, base_steps, progress)
        for name in TASKS:
            make_adapter(folder, name, seed, steps, progress)


def make_base(folder: Path, seed: int, steps: int, progress: Progress) -> None:
    """The model that copies, and its tokenizer."""
    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(small_llama(tokenizer))
    train(model, tokenizer, lambda text: text, steps, BASE_BATCH, BASE_RATE, f"base-{seed}", progress)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def make_adapter(folder: Path, name: str, seed: int, steps: int, progress: Progress) -> None:
    """The adapter of one task, on the base that `folder` holds."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **TASKS[name].lora))
    rule = TASKS[name].rule
    train(adapted, character_tokenizer(), rule, steps, ADAPTER_BATCH, ADAPTER_RATE, f"{name}-{seed}", progress)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained(str(folder / name), save_embedding_layers=False)
    (folder / name / "README.md").unlink()
    stamp_adapter(folder / name, folder / "base")


def stamp_adapter(adapter: Path, base: Path) -> None:
    """Writes down that `adapter` was trained on `base`."""
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto")
    write_stamp(adapter, make_stamp(read_checkpoint(adapter), model, fingerprint(model), base.name))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; a prompt is `<bos> text <sep>` and the model answers after `<sep>`."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, SEP, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {SEP}", special_tokens=[(BOS, vocabulary[BOS]), (SEP, vocabulary[SEP])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[SEP],
        chat_template=CHAT_TEMPLATE,
    )


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """128 wide, 4 layers, grouped-query attention, untied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    rule: Rule,
    steps: int,
    batch: int,
    rate: float,
    name: str,
    progress: Progress,
) -> None:
    """AdamW with one cycle of the learning rate, on fresh random strings at every step."""
    rng = random.Random(f"train-{name}")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in progress.track(range(steps), description=name):
        ids, labels = batch_of(tokenizer, [random_text(rng, TRAINED_LENGTHS) for _ in range(batch)], rule)
        loss = model(input_ids=ids, labels=labels, attention_mask=ids != tokenizer.pad_token_id).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def batch_of(tokenizer: PreTrainedTokenizerFast, texts: list[str], rule: Rule) -> tuple[Tensor, Tensor]:
    """Padded ids [N, T] and labels [N, T] that count only the answer and its end."""
    rows = []
    for text in texts:
        prompt = tokenizer(text).input_ids
        answer = [*tokenizer(rule(text), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return ids, labels
