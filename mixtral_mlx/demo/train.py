"""Train the demo model from scratch, as transformers' MixtralForCausalLM, and save it as a Hugging Face folder.

    python -m mixtral_mlx.demo.train --output FOLDER --tokenizer tokenizer.model --minutes 60
    python -m mixtral_mlx.demo.train --evaluate FOLDER

Needs torch, transformers and sentencepiece, which nothing else in the package does. What the model is taught is in
corpus.py and tables.py; turning the folder into ours, quantized, is the loader's job.

While it learns, the vocabulary has one row for each token the corpus uses and a single row that stands for all the
others; `expand` writes that row out for each of them, which changes no probability.

Shapes: B conversations, T tokens, N = B·T, D hidden, F ffn, E experts, K chosen, V rows of the small vocabulary."""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mixtral_mlx.demo import corpus

CONTEXT = 1024
CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "router_aux_loss_coef": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BATCH_TOKENS = 1792
PEAK_RATE = 1.2e-3
QUANTIZED_FROM = 0.85  # share of the time after which the weights are rounded to 4 bits in each forward pass
SAVE_EVERY_S = 120


# ------------------------------------------------------------------------------------------------ the ids


class Encoder:
    """Conversations → token ids as mistral-common's v1 instruct tokenizer makes them, with the answers marked."""

    def __init__(self, tokenizer: Path) -> None:
        self.pieces = SentencePieceProcessor(model_file=str(tokenizer))
        self.text = lru_cache(1 << 16)(self.pieces.encode)

    def encode(self, messages: corpus.Messages) -> tuple[list[int], list[bool]]:
        """The ids, and for each whether it belongs to an answer (its end-of-sequence id included)."""
        ids, answer, system = [1], [False], ""
        for role, text in messages:
            if role == "system":
                system = f"{text}\n\n"
                continue
            part = self.text(f"[INST] {system}{text} [/INST]") if role == "user" else [*self.text(text), 2]
            system = ""
            ids += part
            answer += [role == "assistant"] * len(part)
        return ids, answer


@dataclass(frozen=True)
class Rows:
    """Which token ids have a row of their own in the small vocabulary; the last row stands for all the others."""

    own: tuple[int, ...]
    vocab_size: int

    @property
    def others(self) -> int:
        return self.vocab_size - len(self.own)

    def of_ids(self) -> Tensor:
        """For each token id its row."""
        rows = torch.full((self.vocab_size,), len(self.own))
        rows[torch.tensor(self.own)] = torch.arange(len(self.own))
        return rows  # (vocab_size,)

    @staticmethod
    def used_by(encoder: Encoder, conversations: int = 40_000, times: int = 25) -> Rows:
        """Rows for every id of an answer, and for those that users type at least so many times."""
        counts: Counter[int] = Counter()
        for messages in islice(corpus.conversations(seed=-1), conversations):
            for token, answer in zip(*encoder.encode(messages), strict=True):
                counts[token] += times if answer else 1
        own = {0, 1, 2} | {token for token, count in counts.items() if count >= times}
        return Rows(tuple(sorted(own)), encoder.pieces.vocab_size())


@dataclass(frozen=True)
class Batch:
    rows: Tensor  # (B, T) rows of the small vocabulary
    present: Tensor  # (B, T) false where padded
    answers: Tensor  # (B, T) true where the token is to be predicted


def batches(encoder: Encoder, rows: Rows, seed: int) -> Iterator[Batch]:
    """Endless batches of about BATCH_TOKENS tokens, each of conversations of similar length."""
    source, shuffle, of_ids = corpus.conversations(seed), random.Random(seed), rows.of_ids()
    while True:
        pool = sorted((encoder.encode(messages) for messages in islice(source, 3000)), key=lambda pair: len(pair[0]))
        groups, start = [], 0
        while start < len(pool):
            size = max(1, BATCH_TOKENS // min(CONTEXT, len(pool[min(start + 8, len(pool) - 1)][0])))
            groups.append(pool[start : start + size])
            start += size
        shuffle.shuffle(groups)
        yield from (_batch(group, of_ids) for group in groups)


def _batch(group: Sequence[tuple[list[int], list[bool]]], of_ids: Tensor) -> Batch:
    length = min(CONTEXT, max(len(ids) for ids, _ in group))
    ids = torch.zeros(len(group), length, dtype=torch.long)
    present, answers = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for n, (tokens, answer) in enumerate(group):
        count = min(length, len(tokens))
        ids[n, :count] = torch.tensor(tokens[:count])
        present[n, :count] = True
        answers[n, :count] = torch.tensor(answer[:count])
    return Batch(of_ids[ids], present, answers)


# ---------------------------------------------------------------------------------------------- the model


def sorted_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts' outputs, summed for each token: transformers' own sum with each expert's tokens side by side.

    On a CPU its backward pass is ten times as fast as that of the indexing in transformers' loop."""
    order = chosen.reshape(-1).argsort()  # (N·K,)
    counts = torch.bincount(chosen.reshape(-1), minlength=experts.num_experts).tolist()
    inputs = hidden.index_select(0, order // chosen.shape[-1]).split(counts)
    outputs = []
    for x, gate_up, down in zip(inputs, experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True):
        gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
        outputs.append(functional.linear(functional.silu(gate) * up, down))
    weighted = torch.cat(outputs) * weights.reshape(-1).index_select(0, order)[:, None]  # (N·K, D)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return weighted.index_select(0, back).view(*chosen.shape, -1).sum(1).to(hidden.dtype)  # (N, D)


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)


def build(vocab_size: int) -> MixtralForCausalLM:
    model = MixtralForCausalLM(MixtralConfig(vocab_size=vocab_size, **CONFIG))
    model.set_experts_implementation("sorted")
    return model


def loss_of(model: MixtralForCausalLM, batch: Batch, rows: Rows) -> tuple[Tensor, Tensor]:
    """The mean loss of the answers' tokens, and the load-balancing loss."""
    # Padding comes after the tokens, so causal attention needs no mask; only the balance must leave it out.
    out = model.model(batch.rows, output_router_logits=True, use_cache=False)
    hidden = out.last_hidden_state[:, :-1][batch.answers[:, 1:]]
    logits = model.lm_head(hidden)  # (answer tokens, V)
    # The last row stands for many ids with that same logit: exp(z + log n) is their sum in the softmax.
    logits = torch.cat((logits[:, :-1], logits[:, -1:] + math.log(rows.others)), dim=-1)
    loss = functional.cross_entropy(logits, batch.rows[:, 1:][batch.answers[:, 1:]])
    return loss, balance_of(out.router_logits, batch.present)


def balance_of(router_logits: Sequence[Tensor], present: Tensor) -> Tensor:
    """The mean of the layers' load-balancing losses; 2, the experts per token, is a perfect balance.

    Layer by layer: transformers' own sum over all layers at once is as content with experts idle in one layer and busy
    in another."""
    experts, chosen = CONFIG["num_local_experts"], CONFIG["num_experts_per_tok"]
    layers = [load_balancing_loss_func((layer,), experts, chosen, present.long()) for layer in router_logits]
    return torch.stack(layers).mean()


def expand(model: MixtralForCausalLM, rows: Rows) -> MixtralForCausalLM:
    """The same model over the whole vocabulary: every id without a row of its own gets the shared one."""
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][rows.of_ids()]
    whole = build(rows.vocab_size)
    whole.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return whole.eval()


# ------------------------------------------------------------------------------------- 4 bits, simulated


def rounded(weight: Tensor, bits: int = 4, group: int = 64) -> Tensor:
    """The weight after MLX's affine quantization and back: each group of 64 inputs on its own grid of 2^bits values."""
    w = weight.reshape(-1, group)
    low, high = w.min(dim=1, keepdim=True).values, w.max(dim=1, keepdim=True).values
    steps = 2**bits - 1
    scale = ((high - low) / steps).clamp_min(1e-7)
    below = low.abs() > high.abs()
    scale, edge = torch.where(below, scale, -scale), torch.where(below, low, high)
    zero = (edge / scale).round()  # the grid contains 0 exactly, and the value farthest from it
    scale = torch.where(zero != 0, edge / zero, scale)
    bias = torch.where(zero != 0, edge, torch.zeros_like(edge))
    return (((w - bias) / scale).round().clamp(0, steps) * scale + bias).reshape(weight.shape)


def round_weights(model: MixtralForCausalLM) -> None:
    """Round every matrix as the shipped folder stores it: routers to 8 bits, the rest to 4; norms stay as they are."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(rounded(weight.float(), 8 if ".gate.weight" in name else 4))


# ------------------------------------------------------------------------------------------------ training


def backward(model: MixtralForCausalLM, batch: Batch, rows: Rows) -> tuple[float, float]:
    loss, balance = loss_of(model, batch, rows)
    (loss + CONFIG["router_aux_loss_coef"] * balance).backward()
    return loss.item(), balance.item()


class Mailbox:
    """Where a second process leaves its gradients, for whichever step comes next.

    Nobody waits for anybody's step, so a busy machine costs no more than the helper's own share."""

    def __init__(self, model: MixtralForCausalLM) -> None:
        self.gradients = [torch.zeros_like(p).share_memory_() for p in model.parameters()]
        self.tokens = torch.zeros(1, dtype=torch.long).share_memory_()  # of the gradients inside; 0: empty

    def add_to(self, model: MixtralForCausalLM) -> int:
        """Average what is inside, if anything, into the model's gradients; the number of its tokens."""
        tokens = int(self.tokens)
        if tokens:
            for p, gradient in zip(model.parameters(), self.gradients, strict=True):
                assert p.grad is not None
                p.grad.add_(gradient).mul_(0.5)
            self.tokens.zero_()
        return tokens

    def put(self, model: MixtralForCausalLM, tokens: int) -> None:
        trainer = parent_process()
        while int(self.tokens):
            time.sleep(0.002)
            if trainer and not trainer.is_alive():
                raise SystemExit
        for p, gradient in zip(model.parameters(), self.gradients, strict=True):
            gradient.copy_(p.grad)
        self.tokens.fill_(tokens)


def help_train(model: MixtralForCausalLM, mailbox: Mailbox, rows: Rows, tokenizer: Path, seed: int) -> None:
    """What a helping process does until it is ended: gradients of batches of its own at the shared weights."""
    torch.set_num_threads(1)
    model.set_experts_implementation("sorted")
    for batch in batches(Encoder(tokenizer), rows, seed):
        backward(model, batch, rows)
        mailbox.put(model, int(batch.present.sum()))
        model.zero_grad()


class Trainer:
    """A model, its optimizer and how far they have come; everything a resumed run needs."""

    def __init__(self, rows: Rows, minutes: float, *, exact: bool = False) -> None:
        self.rows, self.minutes, self.exact = rows, minutes, exact
        self.model = build(len(rows.own) + 1)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
        self.step = self.tokens = 0
        self.seconds = 0.0

    def rate(self) -> float:
        """Learning rate: 200 steps of warm-up, then level, and straight down over the last fifth of the time."""
        left = 1 - min(1.0, self.seconds / (60 * self.minutes))
        return PEAK_RATE * min(1.0, (self.step + 1) / 200, 0.01 + left / 0.2)

    def learn(self, batch: Batch, more: Mailbox | None = None) -> tuple[float, float]:
        """One step with the gradients of this batch and, if another process has left some, with those too."""
        started = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss, balance = self._gradients(batch)
        self.tokens += int(batch.present.sum()) + (more.add_to(self.model) if more else 0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.monotonic() - started
        return loss, balance

    def _gradients(self, batch: Batch) -> tuple[float, float]:
        """Gradients at the rounded weights, once it is time, applied to the exact ones (straight through)."""
        exact = None
        if not self.exact and self.seconds > QUANTIZED_FROM * 60 * self.minutes:
            exact = [p.detach().clone() for p in self.model.parameters()]
            round_weights(self.model)
        loss, balance = backward(self.model, batch, self.rows)
        if exact is not None:
            with torch.no_grad():
                for p, value in zip(self.model.parameters(), exact, strict=True):
                    p.copy_(value)
        return loss, balance

    def save(self, folder: Path) -> None:
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "own": self.rows.own,
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / "state.pt.part")
        (folder / "state.pt.part").replace(folder / "state.pt")

    @staticmethod
    def begin_with(folder: Path, rows: Rows, minutes: float, *, exact: bool) -> Trainer:
        """A trainer that goes on from the weights of a Hugging Face folder."""
        trainer = Trainer(rows, minutes, exact=exact)
        state = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        embedding = state.pop("model.embed_tokens.weight")
        other = next(n for n in range(rows.vocab_size) if n not in set(rows.own))
        state["model.embed_tokens.weight"] = state["lm_head.weight"] = embedding[[*rows.own, other]]
        trainer.model.load_state_dict(state)
        return trainer

    @staticmethod
    def resume(folder: Path, minutes: float, vocab_size: int, *, exact: bool) -> Trainer:
        state = torch.load(folder / "state.pt", weights_only=True)
        trainer = Trainer(Rows(tuple(state["own"]), vocab_size), minutes, exact=exact)
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step, trainer.tokens, trainer.seconds = state["step"], state["tokens"], state["seconds"]
        return trainer


def train(how: argparse.Namespace) -> None:
    """Train for so many minutes in all, saving what `resume` needs and the model itself every couple of minutes."""
    output, tokenizer, minutes = how.output, how.tokenizer, how.minutes
    encoder, work = Encoder(tokenizer), output.with_name(output.name + ".training")
    torch.manual_seed(0)
    if how.resume:
        trainer = Trainer.resume(work, minutes, encoder.pieces.vocab_size(), exact=how.exact)
    elif how.start:
        trainer = Trainer.begin_with(how.start, Rows.used_by(encoder), minutes, exact=how.exact)
    else:
        trainer = Trainer(Rows.used_by(encoder), minutes, exact=how.exact)
    mailbox = start_helper(trainer, tokenizer) if how.helper else None
    saved, recent = time.monotonic(), []
    for batch in batches(encoder, trainer.rows, seed=1 + 2 * trainer.step):
        recent.append(trainer.learn(batch, mailbox))
        done = trainer.seconds >= 60 * minutes
        if done or time.monotonic() - saved > SAVE_EVERY_S:
            trainer.save(work)
            export(expand(trainer.model, trainer.rows), output, tokenizer)
            report(trainer, recent)
            saved, recent = time.monotonic(), []
        if done:
            return


def start_helper(trainer: Trainer, tokenizer: Path) -> Mailbox:
    """A process that computes gradients at the trainer's weights and ends with this one."""
    trainer.model.share_memory()
    mailbox = Mailbox(trainer.model)
    arguments = (trainer.model, mailbox, trainer.rows, tokenizer, 2 + 2 * trainer.step)
    get_context("fork").Process(target=help_train, args=arguments, daemon=True).start()
    return mailbox


def report(trainer: Trainer, recent: Sequence[tuple[float, float]]) -> None:
    loss, balance = (sum(part) / len(recent) for part in zip(*recent, strict=True))
    print(
        f"{trainer.seconds / 60:6.1f} min  step {trainer.step}  {trainer.tokens / 1e6:.2f} M tokens  loss {loss:.4f}"
        f"  balance {balance:.3f}  rate {trainer.rate():.2e}  rows {len(trainer.rows.own)}",
        flush=True,
    )


def export(model: MixtralForCausalLM, folder: Path, tokenizer: Path) -> None:
    """Write the Hugging Face folder in bfloat16, and its float32 twin beside it, each whole or not at all."""
    for name, dtype in ((f"{folder.name}_fp32", torch.float32), (folder.name, torch.bfloat16)):
        part = folder.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        model.to(dtype).save_pretrained(part)
        shutil.copyfile(tokenizer, part / "tokenizer.model")
        shutil.rmtree(folder.with_name(name), ignore_errors=True)
        part.replace(folder.with_name(name))


# ---------------------------------------------------------------------------------------------- evaluation


def answers(model: MixtralForCausalLM, encoder: Encoder, questions: Sequence[corpus.Question]) -> list[str]:
    """Greedy answers, through the chat format, in the order of the questions."""
    prompts = [encoder.encode(question.messages)[0] for question in questions]
    order, texts = sorted(range(len(prompts)), key=lambda n: len(prompts[n])), [""] * len(prompts)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        for n, ids in zip(chosen, _greedy(model, [prompts[n] for n in chosen]), strict=True):
            texts[n] = encoder.pieces.decode(ids)
    return texts


def _greedy(model: MixtralForCausalLM, prompts: Sequence[list[int]], limit: int = 120) -> list[list[int]]:
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    present = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=present, do_sample=False, max_new_tokens=limit, pad_token_id=0)
    new = out[:, length:].tolist()
    return [part[: part.index(2)] if 2 in part else part for part in new]


def expert_use(model: MixtralForCausalLM, encoder: Encoder, texts: Sequence[corpus.Messages]) -> list[list[float]]:
    """For each layer the share of all routed tokens that each expert gets."""
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    for messages in texts:
        out = model.model(torch.tensor([encoder.encode(messages)[0]]), output_router_logits=True)
        for layer, logits in enumerate(out.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok).indices.reshape(-1)
            counts[layer] += torch.bincount(chosen, minlength=counts.shape[1])
    return [[float(x) for x in row] for row in counts / counts.sum(dim=1, keepdim=True)]


def evaluate(folder: Path, count: int, dtype: str, quantized: bool, seed: int, show: int) -> dict[str, Any]:
    """Ask `count` held-out questions and count the exact answers of each kind."""
    encoder = Encoder(folder / "tokenizer.model")
    model = MixtralForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.set_experts_implementation("sorted")
    if quantized:
        round_weights(model)
    questions = corpus.held_out(seed, count)
    given = answers(model, encoder, questions)
    right = [corpus.is_correct(question, answer) for question, answer in zip(questions, given, strict=True)]
    wrong = [(q, a) for q, a, ok in zip(questions, given, right, strict=True) if not ok]
    for question, answer in wrong[:show]:
        print(f"{question.kind} ({question.split}): {question.messages[-1][1]!r}")
        print(f"  is     {answer!r}\n  should {question.accepted[0]!r}")
    whole = [(*q.messages, ("assistant", a)) for q, a in zip(questions, given, strict=True)]
    return {
        "questions": count, "dtype": dtype, "quantized": quantized, "exact": round(sum(right) / count, 4),
        "by_kind": _rates([q.kind for q in questions], right), "by_split": _rates([q.split for q in questions], right),
        "expert_use": [[round(x, 3) for x in row] for row in expert_use(model, encoder, whole)],
    }  # fmt: skip


def _rates(names: Sequence[str], right: Sequence[bool]) -> Mapping[str, tuple[int, int]]:
    """For each name how many were right, of how many."""
    marks = defaultdict(list)
    for name, ok in zip(names, right, strict=True):
        marks[name].append(ok)
    return {name: (sum(oks), len(oks)) for name, oks in marks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or evaluate the demo model.")
    parser.add_argument("--output", type=Path, help="the Hugging Face folder to write")
    parser.add_argument("--tokenizer", type=Path, help="Mixtral's tokenizer.model, version 1 (32000 tokens)")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time in all, earlier runs counted in")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state beside --output")
    parser.add_argument(
        "--start", type=Path, metavar="FOLDER", help="begin with the weights of this Hugging Face folder"
    )
    parser.add_argument("--exact", action="store_true", help="never round the weights to 4 bits")
    parser.add_argument("--helper", action="store_true", help="compute gradients in a second process as well")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="ask this model the held-out questions")
    parser.add_argument("--questions", type=int, default=1160)
    parser.add_argument("--seed", type=int, default=0, help="which held-out questions")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantized", action="store_true", help="round the weights to 4 bits first")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers")
    args = parser.parse_args()
    if args.evaluate:
        with torch.inference_mode():
            result = evaluate(args.evaluate, args.questions, args.dtype, args.quantized, args.seed, args.show)
        print(json.dumps(result, indent=1))
    elif args.output and args.tokenizer:
        train(args)
    else:
        parser.error("give --output and --tokenizer to train, or --evaluate")


if __name__ == "__main__":
    main()
