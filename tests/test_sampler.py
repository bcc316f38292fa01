"""Sampling: the law is exact, log-probabilities are the policy's own, seeds decide everything, nothing is hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VOCAB, scramble_pause, tiny_model

from pause_lightning.errors import UserError
from pause_lightning.pause.logits import GateTemperature, PauseTemperature
from pause_lightning.pause.model import add_pause
from pause_lightning.rollouts.hf import HFSampler
from pause_lightning.rollouts.sampler import Reply, SamplingSettings

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [5, 6, 7], [3]]
IDS = {"eos_id": 2, "pad_id": 0}
EXACT = torch.tensor([[1.0, 2.0, 0.5, 3.0, -1.0, 1.5]])
PAUSE = 4


def sample(model: Any, seed: int = 0, batch_size: int = 64, prompts: Any = PROMPTS, **settings: Any) -> list[Reply]:
    return HFSampler(batch_size).sample(model, prompts, SamplingSettings(**{"max_new_tokens": 12, **settings}), seed, **IDS)


@pytest.mark.parametrize("head", ["gate", "row"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 20}, {"pause_temperature": 2.0}])
def test_logprobs_equal_a_full_forward(head: str, settings: dict) -> None:
    model = scramble_pause(add_pause(tiny_model(), VOCAB, head=head))
    replies = sample(model, **settings)
    assert any(VOCAB in r.ids for r in replies)
    for prompt, reply in zip(PROMPTS, replies):
        with torch.no_grad():
            law = model(torch.tensor([[*prompt, *reply.ids]])).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(reply.ids))
        assert torch.allclose(torch.tensor(reply.logprobs), law[at, reply.ids], atol=1e-4)


def test_greedy_is_what_generate_does(pause_model: Any) -> None:
    for prompt, reply in zip(PROMPTS, sample(pause_model, temperature=0.0)):
        expected = pause_model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert reply.ids == expected[0, len(prompt) :].tolist()


def test_replies_end_at_eos_and_say_so(pause_model: Any) -> None:
    replies = [r for seed in range(20) for r in sample(pause_model, seed)]
    ended = [r for r in replies if r.finish_reason == "eos"]
    assert ended and all(r.ids[-1] == 2 and 2 not in r.ids[:-1] for r in ended)
    assert all(len(r.ids) == 12 and 2 not in r.ids for r in replies if r.finish_reason == "length")
    assert all(len(r.logprobs) == len(r.ids) for r in replies)


def test_the_seed_decides_and_the_global_state_is_left_alone(pause_model: Any) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(pause_model, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample(pause_model, seed=3) == first != sample(pause_model, seed=4)
    assert first[0] != first[3]  # the same prompt twice is two draws


def test_replies_do_not_depend_on_what_was_sampled_before(pause_model: Any) -> None:
    def short() -> list[Reply]:
        return sample(pause_model, 3, prompts=[[5, 6, 7], [8, 9, 10]] * 8, max_new_tokens=9)

    before = short()
    sample(pause_model, prompts=[[7] * 40], max_new_tokens=20)
    assert short() == before  # to the last bit of the log-probabilities
    assert getattr(pause_model, "_previous_max_cache_length", 0) < 20


def test_a_model_folders_own_sampling_defaults_are_not_applied(pause_model: Any) -> None:
    plain = sample(pause_model, seed=5)
    pause_model.generation_config.top_k = 1
    pause_model.generation_config.repetition_penalty = 5.0
    assert sample(pause_model, seed=5) == plain


def test_sampled_tokens_follow_the_law(pause_model: Any) -> None:
    from scipy.stats import chisquare

    with torch.no_grad():
        law = pause_model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1)
    n = 4000
    drawn = sample(pause_model, prompts=[[5, 6, 7]] * n, batch_size=n, max_new_tokens=1)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in drawn]), minlength=VOCAB + 1)
    keep = law * n > 5
    assert keep.sum() > 20
    observed, expected = counts[keep].double(), law[keep] * n
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_the_context_bounds_a_reply(pause_model: Any) -> None:
    reply = sample(pause_model, prompts=[[5] * 60], max_new_tokens=100)[0]
    assert len(reply.ids) <= 4


# ---- pause and gate temperature, on exact probabilities


def paused(processor: Any, scores: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    return (processor(torch.zeros(1, 1), scores) / tau).softmax(-1)[0]


def test_paper_values_of_pause_temperature() -> None:
    """reference.md 10: p = .2, T = 2 -> 1/3, the others times .8333; T = 0 -> 0; T = 1 -> nothing changes."""
    p = torch.tensor([0.3, 0.1, 0.25, 0.15, 0.2])
    doubled = paused(PauseTemperature(PAUSE, 2.0), p.log().unsqueeze(0))
    assert torch.allclose(doubled, torch.tensor([0.25, 0.0833333, 0.2083333, 0.125, 1 / 3]), atol=1e-6)
    assert paused(PauseTemperature(PAUSE, 0.0), p.log().unsqueeze(0))[PAUSE] == 0
    assert torch.allclose(paused(PauseTemperature(PAUSE, 1.0), p.log().unsqueeze(0)), p)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("t", [0.0, 0.3, 4.0])
def test_pause_temperature_under_a_sampling_temperature(tau: float, t: float) -> None:
    p = (EXACT / tau).softmax(-1)[0]
    odds = p[PAUSE] / (1 - p[PAUSE])
    wanted = t * odds / (1 + t * odds)
    got = paused(PauseTemperature(PAUSE, t, tau), EXACT, tau)
    assert torch.allclose(got[PAUSE], wanted, atol=1e-6)
    others = torch.arange(6) != PAUSE
    assert torch.allclose(got[others], p[others] * (1 - wanted) / (1 - p[PAUSE]), atol=1e-6)


def test_a_pause_that_is_all_there_is_stays() -> None:
    only = torch.full((1, 6), float("-inf"))
    only[0, PAUSE] = 0.0
    assert paused(PauseTemperature(PAUSE, 0.0), only)[PAUSE] == 1


def test_paper_values_of_gate_temperature() -> None:
    """reference.md 10: g = (0, ln 3), tau_g = 2 -> P(pause) = .3660."""
    scores = torch.tensor([[0.375, 0.375, 0.25]]).log()
    got = paused(GateTemperature(2, 2.0), scores)
    assert got[2].item() == pytest.approx(0.3660, abs=1e-4)
    assert got[0] == got[1] == pytest.approx((1 - got[2].item()) / 2, abs=1e-6)


def test_pause_temperature_zero_forbids_pauses_in_replies(pause_model: Any) -> None:
    def pauses(t: float) -> int:
        return sum(r.ids.count(VOCAB) for seed in range(5) for r in sample(pause_model, seed, pause_temperature=t))

    assert pauses(0.0) == 0 < pauses(1.0) < pauses(20.0)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"gate_temperature": 0.0}])
def test_settings_out_of_range_are_named(bad: dict) -> None:
    with pytest.raises(UserError, match=rf"model.rollout_sampling.{next(iter(bad))} must be"):
        SamplingSettings(**bad).check("model.rollout_sampling")
