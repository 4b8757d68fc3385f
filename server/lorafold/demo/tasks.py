"""What each demo adapter does to a string, as a rule that an answer can be checked against.

Pure Python: the alphabet, the rules, and seeded strings to train and test on. No torch.
"""

import codecs
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ALPHABET = string.ascii_letters + string.digits + " _"
TRAINED_LENGTHS = (1, 24)
TESTED_LENGTHS = (6, 20)
"""Long enough that a random string was never trained on."""

Rule = Callable[[str], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One adapter of the demo set."""

    rule: Rule
    """The right answer for a prompt."""
    says: str
    """What it does, for people."""
    lora: dict[str, Any]
    """The `peft.LoraConfig` arguments that make it its kind."""


def rot13(text: str) -> str:
    """Letters move 13 places; everything else stays."""
    return codecs.encode(text, "rot13")


def shift(text: str) -> str:
    """Letters and digits move one place, round the end of their own row."""
    rows = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
    return text.translate(str.maketrans("".join(rows), "".join(row[1:] + row[0] for row in rows)))


def mask_vowels(text: str) -> str:
    """Vowels become underscores."""
    return text.translate(str.maketrans("aeiouAEIOU", "_" * 10))


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TASKS: dict[str, Task] = {
    "upper": Task(
        rule=str.upper,
        says="upper-cases (plain LoRA)",
        lora={"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR},
    ),
    "rot13": Task(
        rule=rot13,
        says="rotates letters by 13 (rsLoRA, alpha != r)",
        lora={"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ALL_LINEAR},
    ),
    "shift": Task(
        rule=shift,
        says="moves letters and digits by one (DoRA)",
        lora={"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ALL_LINEAR},
    ),
    "swapcase": Task(
        rule=str.swapcase,
        says="swaps upper and lower case (rank and alpha patterns)",
        lora={
            "r": 8,
            "lora_alpha": 8,
            "target_modules": ALL_LINEAR,
            "rank_pattern": {"q_proj": 4, "k_proj": 2},
            "alpha_pattern": {"v_proj": 16, "down_proj": 24},
        },
    ),
    "vowels": Task(
        rule=mask_vowels,
        says="masks vowels (LoRA on attention, a whole lm_head of its own)",
        lora={
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "modules_to_save": ["lm_head"],
        },
    ),
}


def random_text(rng: random.Random, lengths: tuple[int, int]) -> str:
    """A string that every task changes: it has a lower-case vowel."""
    length = rng.randint(*lengths)
    text = [rng.choice(ALPHABET) for _ in range(length)]
    text[rng.randrange(length)] = rng.choice("aeiou")
    return "".join(text)


def held_out(count: int, seed: int = 2026) -> list[str]:
    """Strings for testing."""
    rng = random.Random(f"held-out-{seed}")
    return [random_text(rng, TESTED_LENGTHS) for _ in range(count)]
