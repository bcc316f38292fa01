"""What is learned from: recipes, the rollout store, batches, metrics and statistics."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from pause_lightning.batches import BucketBatches, PromptLoader, ResumableLoader, collate
from pause_lightning.errors import RunStopped, UserError
from pause_lightning.metrics import ReplyMetrics
from pause_lightning.recipes import Example, STaR
from pause_lightning.rollouts import Rollout, RolloutStore
from pause_lightning.stats import mcnemar, wilson_interval


def rollout(problem: str = "p", sample: int = 0, unit: int = 0, size: int = 2, **fields: Any) -> Rollout:
    base = Rollout(unit, size, sample, problem, sample, [1], [5, 2], "x", "1", 1.0, True, True, 0, "eos", [-0.1, -0.2], 0)
    return replace(base, **fields)


# ---- STaR


def test_star_keeps_correct_finished_replies_only() -> None:
    rows = [
        rollout("a"),
        rollout("b", correct=False, reward=0.0),
        rollout("c", finish_reason="length"),
        rollout("d", reply_ids=[6, 2]),
    ]
    kept = STaR().select(rows, [], 0)
    assert kept == [Example("a", (1,), (5, 2)), Example("d", (1,), (6, 2))]


def test_star_options() -> None:
    rows = [rollout("a", s, reply_ids=[5 + s // 2, 2]) for s in range(6)]
    assert len(STaR().select(rows, [], 0)) == 6
    assert len(STaR(distinct=True).select(rows, [], 0)) == 3
    assert len(STaR(max_per_problem=2).select(rows, [], 0)) == 2
    assert STaR(max_per_problem=2).select(rows, [], 1) == STaR(max_per_problem=2).select(rows, [], 1)
    truth = [Example(f"t{i}", (1,), (9, 2)) for i in range(4)]
    mixed = STaR(ground_truth=1.5).select(rows, truth, 0)
    assert len(mixed) == 15 and sum(e in truth for e in mixed) == 9
    assert STaR(ground_truth=1.0).select([], truth, 0) == []
    for bad in ({"max_per_problem": 0}, {"ground_truth": -1.0}):
        with pytest.raises(UserError, match=r"data\.recipe"):
            STaR(**bad)


# ---- the store


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "outer_000")
    store.open({"policy": "x"})
    store.append(1, [rollout("b", unit=1, size=1, text="ünïcode")])
    store.append(0, [rollout("a", 0), rollout("a", 1)])
    assert [(r.problem_id, r.sample) for r in store.read()] == [("a", 0), ("a", 1), ("b", 0)]
    assert store.units() == {0, 1}
    (tmp_path / "outer_000" / "rank_00000.jsonl").unlink()
    assert store.units() == {1}  # a shard that is gone is seen


@pytest.mark.parametrize("torn", ['{"unit": 1, "unit', "null\n", '{"unit": 1}\n', "\x00\x00\n"])
def test_a_torn_last_line_is_cut_off_and_nothing_else(tmp_path: Path, torn: str) -> None:
    store = RolloutStore(tmp_path)
    store.open({})
    store.append(0, [rollout("a", 0), rollout("a", 1)])
    shard = tmp_path / "rank_00000.jsonl"
    good = shard.read_bytes()
    shard.write_bytes(good + torn.encode())
    assert len(store.read()) == 2
    store.open({})
    assert shard.read_bytes() == good or torn.endswith("\n")  # a whole line that is none of ours stays, unread
    store.append(0, [rollout("b", unit=1, size=1)])
    assert [r.problem_id for r in store.read()] == ["a", "a", "b"]


def test_a_unit_counts_when_all_its_lines_are_there(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.append(0, [rollout("a", 0, size=2)])
    assert store.read() == []
    store.append(0, [rollout("a", 0, size=2), rollout("a", 1, size=2)])  # sampled again after a kill
    assert [r.sample for r in store.read()] == [0, 1]


def test_rollouts_of_another_policy_are_refused(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.open({"policy": "x", "seed": 1})
    store.open({"policy": "z", "seed": 1})  # nothing sampled yet: nothing to lose
    store.append(0, [rollout("a", size=1)])
    store.open({"policy": "z", "seed": 1})
    for meta in (None, "{"):
        with pytest.raises(UserError, match=r"another policy or other settings \(policy"):
            store.open({"policy": "y", "seed": 1})
        if meta:
            (tmp_path / "meta.json").write_text(meta)


def test_a_changed_byte_in_a_rollout_is_seen(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.append(0, [rollout("a", 0, size=1), rollout("b", unit=1, size=1)])
    shard = tmp_path / "rank_00000.jsonl"
    good = shard.read_bytes()
    for at in range(0, len(good), 7):
        shard.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        rows = store.read()
        assert len(rows) < 2 and all(r == rollout(r.problem_id, unit=r.unit, size=1) for r in rows)


def test_a_full_disk_loses_no_finished_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RolloutStore(tmp_path)
    store.append(0, [rollout("a", 0), rollout("a", 1)])

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunStopped, match=r"No space left on device; the finished ones are kept"):
        store.append(0, [rollout("b", unit=1, size=1)])
    monkeypatch.undo()
    assert {r.problem_id for r in store.read()} >= {"a"}
    for line in (tmp_path / "rank_00000.jsonl").read_text().splitlines()[:2]:
        record = json.loads(line)
        assert record.pop("crc") and record == asdict(rollout("a", record["sample"]))


# ---- batches


def test_labels_cover_the_reply_and_its_eos_and_nothing_else() -> None:
    batch = collate([Example("a", (7, 8), (9, 2)), Example("b", (7,), (9, 9, 9, 2))], pad_id=2)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 2, 2], [7, 9, 9, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # pad == EOS (as in SmolLM2): the EOS is learned, the pad is not
    assert batch["labels"].tolist() == [[-100, -100, 9, 2, -100], [-100, 9, 9, 9, 2]]


def test_buckets_hold_every_example_once_and_waste_little() -> None:
    lengths = torch.randint(10, 300, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = BucketBatches(lengths, 8, seed=0)
    epochs = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
        assert sorted(i for b in epochs[-1] for i in b) == list(range(1000))
        padded = sum(max(lengths[i] for i in b) * len(b) for b in epochs[-1])
        assert sum(lengths) / padded > 0.93
    assert epochs[0] != epochs[1]
    batches.set_epoch(0)
    assert list(batches) == epochs[0] and len(batches) == 125


def test_processes_share_the_batches_of_an_epoch() -> None:
    lengths = list(range(1, 53))
    shards = [list(BucketBatches(lengths, 4, seed=1, rank=r, world_size=2)) for r in range(2)]
    assert len(shards[0]) == len(shards[1]) == 7
    assert {i for s in shards for b in s for i in b} == set(range(52))


@pytest.mark.parametrize("examples", [1, 3, 5, 17])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_every_process_gets_equally_many_batches(world: int, examples: int) -> None:
    """Also when there are fewer batches than processes: one that gets none would leave the others waiting."""
    shards = [list(BucketBatches([4] * examples, 4, seed=1, rank=r, world_size=world)) for r in range(world)]
    batches = math.ceil(examples / 4)
    assert {len(s) for s in shards} == {math.ceil(batches / world)}
    assert {i for s in shards for b in s for i in b} == set(range(examples))


def test_a_loader_goes_on_where_it_was() -> None:
    examples = [Example(str(i), (1,) * (i % 5 + 1), (2,)) for i in range(20)]

    def loader() -> ResumableLoader:
        return ResumableLoader(
            examples, BucketBatches([len(e) for e in examples], 3, seed=0), lambda e: [x.problem_id for x in e]
        )

    second = loader()
    second.skip(3)
    assert list(second) == list(loader())[3:]
    assert list(second) == list(loader())  # the next epoch is whole


@pytest.mark.parametrize("world", [1, 2, 3])
def test_prompts_are_dealt_out_once_and_evenly(world: int) -> None:
    loaders = [list(PromptLoader(range(10), 3, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in loaders}) == 1
    batches = sorted((b for rank in loaders for b in rank), key=lambda b: b.index)
    assert [b.index for b in batches] == list(range(len(batches)))
    assert [b.prompts for b in batches if b.prompts] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)]


# ---- metrics and statistics


def test_metrics_by_hand() -> None:
    metrics = ReplyMetrics()
    for correct, pauses, tokens, finished, answered in [
        (1, 2, 10, 1, 1),
        (0, 5, 20, 0, 0),
        (1, 0, 10, 1, 1),
        (0, 1, 10, 1, 1),
    ]:
        metrics.update(
            correct=bool(correct),
            reference_correct=False,
            pauses=pauses,
            tokens=tokens,
            finished=bool(finished),
            answered=bool(answered),
        )
    m = metrics.compute()
    assert (m["accuracy"], m["n"], m["reference_accuracy"]) == (0.5, 4, 0)
    assert (m["pauses"], m["pauses_correct"], m["pauses_incorrect"]) == (2, 1, 3)
    assert (m["reply_length"], m["finished"], m["no_answer"], m["pause_rate"]) == (12.5, 0.75, 0.25, 8 / 50)
    interval = binomtest(2, 4).proportion_ci(method="wilson")
    assert (m["accuracy_low"], m["accuracy_high"]) == pytest.approx((interval.low, interval.high))


def test_wilson_and_mcnemar_against_scipy() -> None:
    for k, n in [(0, 10), (10, 10), (37, 100), (650, 1000)]:
        expected = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
    before = [True] * 30 + [False] * 70
    after = [True] * 25 + [False] * 5 + [True] * 20 + [False] * 50
    lost, gained, p = mcnemar(before, after)
    assert (lost, gained) == (5, 20) and p == pytest.approx(binomtest(5, 25).pvalue)
    assert mcnemar([True], [True]) == (0, 0, 1.0)
