"""The law of pausing: pause and gate temperature on exact probabilities, and settings that are out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pause_lightning.errors import UserError
from pause_lightning.pause.logits import GateTemperature, PauseTemperature
from pause_lightning.rollouts.sampler import SamplingSettings

EXACT = torch.tensor([[1.0, 2.0, 0.5, 3.0, -1.0, 1.5]])
PAUSE = 4


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


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"gate_temperature": 0.0}])
def test_settings_out_of_range_are_named(bad: dict) -> None:
    with pytest.raises(UserError, match=rf"model.rollout_sampling.{next(iter(bad))} must be"):
        SamplingSettings(**bad).check("model.rollout_sampling")
