"""Make the demo model, its tokenizer and its batch from a seed.

The model is a very small Qwen3, so the demo runs in seconds on any CPU and still takes the same
path through the engine as a large model. It learns the tasks of `demo_tasks.py` and nothing else.
Run from the repository root: `python tools/train_demo_model.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import demo_tasks
from demo_batches import (
    IGNORED,
    KIND_WEIGHTS,
    TURN_END,
    TURN_START,
    chat_prompt,
    draw_rows,
    encode,
    to_batch,
)
from demo_tasks import Task

DEMO_SEED = 2026
DEMO_SIZE = 500
MAX_ANSWER_TOKENS = 48
END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# One token per digit and per capital sign makes sums and Roman numerals easy to learn. A word
# takes the space before it, punctuation the space after it, so that list items look alike.
PIECES = r" ?\p{Lu}?\p{Ll}+|\p{L}|\p{N}|[^\s\p{L}\p{N}]+ ?|\s"
VOCABULARY = 768
PART_SIZE = 16


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Learn byte-level merges from the tasks; every byte is a token, so any text round trips."""
    rng = random.Random(0)
    tasks = (
        demo_tasks.make_task(rng, kind, held_out=False)
        for _ in range(4000)
        for kind in KIND_WEIGHTS
    )
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (f"system user assistant {task.prompt} {task.answer}" for task in tasks)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Set up the untrained network; six layers split evenly over two or three stages, not four."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def training_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Draw fresh tasks without end, as parts whose rows are of like length.

    Each step sees every kind, or the kinds would overwrite each other, and yet little is padding.
    """
    rng = random.Random(seed)
    while True:
        rows = draw_rows(tokenizer, rng, size)
        rows.sort(key=lambda row: len(row[0]))
        parts = [rows[start : start + PART_SIZE] for start in range(0, size, PART_SIZE)]
        yield [to_batch(part, tokenizer.pad_token_id) for part in parts]


def answer_logits(
    model: Qwen3ForCausalLM, inputs: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Score only the chosen positions. Padding is on the right, so the causal mask is enough."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden[chosen])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 100 steps, hold, then fall in a line over the last 40 % of the steps."""
    remaining = (steps - step) / (0.4 * steps)
    return peak * min(1.0, (step + 1) / 100, remaining)


def build_optimizer(model: Qwen3ForCausalLM) -> torch.optim.AdamW:
    """Decay the matrices only; norms are left free."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def add_gradients(model: Qwen3ForCausalLM, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Add up the gradients of all parts of a step and give their mean loss."""
    total = 0.0
    for inputs, targets in parts:
        chosen = targets != IGNORED
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = answer_logits(model, inputs, chosen)
        loss = functional.cross_entropy(logits.float(), targets[chosen]) / len(parts)
        loss.backward()
        total += loss.item()
    return total


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> None:
    """Run the loop, saving the model and its held-out accuracy now and then."""
    optimizer = build_optimizer(model)
    batches = training_batches(tokenizer, options.seed, options.batch)
    began = time.monotonic()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.peak_rate)
        loss = add_gradients(model, next(batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss:.4f} {time.monotonic() - began:.0f} s", flush=True)
        if (step + 1) % options.save_every == 0:
            save(model, tokenizer, options.out / "model")
            report(options.out / "model", demo_tasks.generate(options.seed, 300))


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the weights as bfloat16 safetensors, with the tokenizer and greedy defaults."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
    )
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def report(folder: Path, tasks: list[Task]) -> None:
    """Print the share of right answers per kind, from the saved weights in their saved precision.

    When every answer token is the most likely one after those before it, greedy decoding gives
    exactly that answer, so one pass over the whole text is enough.
    """
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    right: Counter[str] = Counter()
    for start in range(0, len(tasks), 100):
        part = tasks[start : start + 100]
        inputs, targets = to_batch(encode(tokenizer, part), tokenizer.pad_token_id)
        best = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
        correct = ((best == targets) | (targets == IGNORED)).all(dim=1)
        right.update(task.kind for task, good in zip(part, correct.tolist(), strict=True) if good)
    for kind, total in Counter(task.kind for task in tasks).items():
        print(f"{kind:12} {right[kind]:4} of {total:4}  {right[kind] / total:.1%}")
    print(
        f"{'all':12} {right.total():4} of {len(tasks):4}  {right.total() / len(tasks):.1%}",
        flush=True,
    )


def write_batch(out: Path, tasks: list[Task]) -> None:
    """Write the demo's batch file, and beside it the answers that a run is checked against."""
    with (
        (out / "requests.jsonl").open("w") as requests,
        (out / "answers.jsonl").open("w") as answers,
    ):
        for number, task in enumerate(tasks):
            custom_id = f"{task.kind}-{number:04d}"
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": task.prompt}],
                "max_tokens": MAX_ANSWER_TOKENS,
                "temperature": 0,
            }
            line = {
                "custom_id": custom_id,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            requests.write(json.dumps(line) + "\n")
            answers.write(json.dumps({"custom_id": custom_id, "answer": task.answer}) + "\n")


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, tasks: list[Task]) -> None:
    """Stop early if text does not round trip, or if serving and training prompts differ."""
    for text in ["naïve 東京 🙂\n\t  x", *(task.prompt for task in tasks[:50])]:
        if tokenizer.decode(tokenizer(text)["input_ids"]) != text:
            raise ValueError(f"the tokenizer does not round trip {text!r}")
    message = {"role": "user", "content": tasks[0].prompt}
    rendered = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    if rendered != chat_prompt(tasks[0].prompt):
        raise ValueError("the chat template and the training prompt differ")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model and write its batch.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("examples/demo"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="tasks in a training step")
    parser.add_argument("--peak-rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument(
        "--save-every", type=int, default=500, help="steps between saved checkpoints"
    )
    return parser.parse_args()


def main() -> None:
    """Build everything under the output folder, then print what the model can do."""
    options = parse_options()
    began = time.monotonic()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = demo_tasks.generate(DEMO_SEED, DEMO_SIZE)
    write_batch(options.out, tasks)
    tokenizer = build_tokenizer()
    check_tokenizer(tokenizer, tasks)
    model = build_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, options)
    save(model, tokenizer, options.out / "model")
    report(options.out / "model", demo_tasks.generate(DEMO_SEED + 1, demo_tasks.MOST_TASKS))
    print("The demo's own batch:")
    report(options.out / "model", tasks)
    print(f"{time.monotonic() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
