"""The loop of pre-training: steps, measurements and checkpoints."""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayrlhf.files import replacing
from scripts.pretrain import attention
from scripts.pretrain.corpus import IGNORED, Corpus
from scripts.pretrain.schedule import Budget, Position


class Trainer:
    """A model, its optimisers and its position in data and schedule.

    Args:
        model: is trained in place.
        corpus: to train on.
        directory: keeps the checkpoints and `log.jsonl`.
        arguments: those of the command.
    """

    def __init__(self, model: PreTrainedModel, corpus: Corpus, directory: Path, arguments: argparse.Namespace) -> None:
        self.model, self.corpus, self.directory, self.arguments = model, corpus, directory, arguments
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            model.set_attn_implementation(attention.NAME)
        self._training_loss = torch.compile(self._loss, dynamic=False) if arguments.compile else self._loss
        embeddings = {id(each) for name, each in model.named_parameters() if "embed" in name}
        hidden = [each for each in model.parameters() if each.ndim == 2 and id(each) not in embeddings]
        chosen = {id(each) for each in hidden}
        rest = [each for each in model.parameters() if id(each) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            # The update of a matrix is then as large as AdamW's would be, so both take rates of the same size.
            torch.optim.Muon(hidden, lr=arguments.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.position = Position()
        self._packed: tuple[Any, list[list[tuple[int, int]]]] = (None, [])

    @property
    def window(self) -> int:
        decays = self.position.decay_from is not None
        return self.arguments.last_window if decays else self.arguments.window

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of the loss over all targets, nats."""
        # Compilation takes most of a minute for each shape: too long for the few batches that measure the loss.
        loss = self._training_loss if self.model.training else self._loss
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bfloat16):
            return loss(inputs.to(self.device), targets.to(self.device))

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def micro_batches(self, windows: Sequence[Any], corpus: Corpus, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = max(1, self.arguments.micro_batch_tokens // length)
        for first in range(0, len(windows), rows):
            yield corpus.batch(windows[first : first + rows], length)

    def next_windows(self) -> list[Any]:
        """The windows of the next step; `position` moves behind them.

        Windows that no longer fill a step at the end of an epoch are skipped: each epoch has others.
        """
        rows = max(1, self.arguments.batch_tokens // self.window)
        for _ in range(2):
            key = (self.arguments.seed, self.position.epoch, self.window)
            if self._packed[0] != key:
                self._packed = (key, self.corpus.windows(self.window, "-".join(map(str, key))))
            first = self.position.next
            found = self._packed[1][first : first + rows]
            if len(found) == rows:
                self.position = replace(self.position, next=first + rows)
                return found
            self.position = replace(self.position, epoch=self.position.epoch + 1, next=0)
        raise SystemExit(f"the corpus fills no {rows} windows of {self.window} tokens; set --batch-tokens lower")

    def step(self, budget: Budget) -> dict[str, float]:
        """One step of the optimisers."""
        began = time.monotonic()
        if self.position.decay_from is None and self.position.decays(budget):
            self.save("stable.pt")
            spent = self.position.spent(budget)
            self.position = replace(self.position, decay_from=spent, epoch=self.position.epoch + 1, next=0)
        rate = self.position.rate(budget, self.arguments.warmup)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.arguments.lr * rate
        batches = list(self.micro_batches(self.next_windows(), self.corpus, self.window))
        count = sum(int((targets != IGNORED).sum()) for _, targets in batches)
        losses = []
        for inputs, targets in batches:
            loss = self.loss(inputs, targets) / count
            loss.backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = float(torch.stack(losses).sum())
        took = time.monotonic() - began
        now = self.position
        self.position = replace(now, steps=now.steps + 1, tokens=now.tokens + count, seconds=now.seconds + took)
        return {"loss": mean, "norm": float(norm), "rate": rate, "tokens_per_s": count / took}

    @torch.no_grad()
    def evaluate(self, corpus: Corpus) -> float:
        """The loss on other posts, nats a token, in windows of the size of now."""
        self.model.eval()
        total, count = 0.0, 0
        for inputs, targets in self.micro_batches(corpus.windows(self.window, "validation"), corpus, self.window):
            total += float(self.loss(inputs, targets))
            count += int((targets != IGNORED).sum())
        self.model.train()
        return total / count

    def save(self, name: str, budget: Budget | None = None) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "position": asdict(self.position),
            "budget": None if budget is None else asdict(budget),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with replacing(self.directory / name) as temporary:
            torch.save(state, temporary)

    def load(self, budget: Budget) -> None:
        """Go on from `decay.pt` if it belongs to the same budget, else from `stable.pt`, else from nothing."""
        for name in ("decay.pt", "stable.pt"):
            if not (self.directory / name).exists():
                continue
            state = torch.load(self.directory / name, weights_only=True, map_location=self.device)
            if name == "decay.pt" and state["budget"] != asdict(budget):
                continue
            self.model.load_state_dict(state["model"])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            self.position = Position(**state["position"])
            print(f"goes on from {self.directory / name}: {self.position.tokens:,} tokens", flush=True)
            return

    def train(self, budget: Budget, held_out: Corpus) -> bool:
        """Train until the budget is spent (True) or a signal asks for an end (False)."""
        asked: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: asked.append(number))
        saved = time.monotonic()
        evaluated = self.position.tokens
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as log:
            while not self.position.ends(budget) and not asked:
                row = self.step(budget)
                now = self.position
                if now.tokens - evaluated >= self.arguments.evaluate_every:
                    evaluated = now.tokens
                    row["validation"] = self.evaluate(held_out)
                if now.steps % 10 == 0 or "validation" in row:
                    log.write(json.dumps({**asdict(now), **row}) + "\n")
                    log.flush()
                    share = f"{now.spent(budget) / budget.amount:.1%}, " if math.isfinite(budget.amount) else ""
                    words = ", ".join(f"{name} {value:,.4g}" for name, value in row.items())
                    print(f"{share}step {now.steps}, {now.tokens:,} tokens: {words}", flush=True)
                if time.monotonic() - saved > 60 * self.arguments.save_minutes:
                    self.save_here(budget)
                    saved = time.monotonic()
        self.save_here(budget)
        return not asked

    def save_here(self, budget: Budget) -> None:
        """Write the checkpoint of this part of the schedule."""
        decays = self.position.decay_from is not None
        self.save("decay.pt" if decays else "stable.pt", budget if decays else None)
        if not decays:
            (self.directory / "decay.pt").unlink(missing_ok=True)  # it began before this

    def export(self, directory: Path) -> None:
        """Write the model in bfloat16, with its tokenizer, as transformers and vLLM read it.

        The tokenizer says how many positions were trained.
        """
        with replacing(directory, directory=True) as temporary:
            # Of a copy, since the library would write the tied head twice if weights were given.
            copy.deepcopy(self.model).to(torch.bfloat16).save_pretrained(temporary)
            shutil.copy(self.arguments.tokenizer / "tokenizer.json", temporary)
            facts = json.loads((self.arguments.tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
            facts["model_max_length"] = max(self.arguments.window, self.arguments.last_window)
            (temporary / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
