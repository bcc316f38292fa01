"""Sampling: the law is exact, log-probabilities are the policy's own, seeds decide everything, nothing is hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VOCAB, scramble_pause, tiny_model

from pause_lightning.errors import UserError
from pause_lightning.pause.model import add_pause
from pause_lightning.rollouts.continuous import ContinuousSampler, inverse_cdf
from pause_lightning.rollouts.hf import HFSampler
from pause_lightning.rollouts.sampler import Reply, SamplingSettings

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [5, 6, 7], [3]]
IDS = {"eos_id": 2, "pad_id": 0}
ENGINES: dict[str, Any] = {"generate": HFSampler, "continuous": ContinuousSampler}
engine: Any = None


@pytest.fixture(autouse=True, params=list(ENGINES))
def each_engine(request: pytest.FixtureRequest) -> None:
    """Every test here holds for every engine."""
    global engine
    engine = ENGINES[request.param]


def sample(model: Any, seed: int = 0, batch_size: int = 64, prompts: Any = PROMPTS, **settings: Any) -> list[Reply]:
    return engine(batch_size).sample(model, prompts, SamplingSettings(**{"max_new_tokens": 12, **settings}), seed, **IDS)


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


def test_pause_temperature_zero_forbids_pauses_in_replies(pause_model: Any) -> None:
    def pauses(t: float) -> int:
        return sum(r.ids.count(VOCAB) for seed in range(5) for r in sample(pause_model, seed, pause_temperature=t))

    assert pauses(0.0) == 0 < pauses(1.0) < pauses(20.0)


def test_the_model_is_left_as_it_was(pause_model: Any) -> None:
    before = {k: v.clone() for k, v in pause_model.state_dict().items()}
    pause_model.train()
    pause_model.eval()
    sample(pause_model)
    assert all(torch.equal(v, before[k]) for k, v in pause_model.state_dict().items())
    assert all(p.grad is None for p in pause_model.parameters())


# ---- the continuous engine


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "gpt2"])
def test_greedy_replies_are_those_of_generate_in_any_slots(arch: str, tied: bool) -> None:
    model = scramble_pause(add_pause(tiny_model(arch, tied), VOCAB))
    prompts = [[3 + (7 * i + j) % 50 for j in range(1 + i % 29)] for i in range(60)]
    expected = HFSampler().sample(model, prompts, SamplingSettings(temperature=0.0, max_new_tokens=20), 0, **IDS)
    for slots, refill in ((60, 0.0), (7, 0.0), (16, 0.5)):
        got = ContinuousSampler(slots, refill).sample(
            model, prompts, SamplingSettings(temperature=0.0, max_new_tokens=20), 0, **IDS
        )
        assert [r.ids for r in got] == [r.ids for r in expected]
        assert all(abs(a - b) < 1e-4 for x, y in zip(got, expected) for a, b in zip(x.logprobs, y.logprobs))


def test_a_reply_does_not_depend_on_its_neighbours() -> None:
    model = scramble_pause(add_pause(tiny_model(), VOCAB))
    prompts = [[3 + (7 * i + j) % 50 for j in range(1 + i % 29)] for i in range(100) for _ in range(2)]
    settings = SamplingSettings(max_new_tokens=20)
    runs = [ContinuousSampler(slots).sample(model, prompts, settings, 0, **IDS) for slots in (8, 33, 200)]
    same = [sum(a.ids == b.ids for a, b in zip(runs[0], other)) / len(prompts) for other in runs[1:]]
    assert min(same) >= 0.995
    assert runs[0][0].ids != runs[0][1].ids  # two samples of one prompt
    assert runs[0] == ContinuousSampler(8).sample(model, prompts, settings, 0, **IDS)  # to the last bit


def test_inverse_cdf_draws_from_the_law() -> None:
    from scipy.stats import chisquare

    scores = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 2
    scores[0, ::7] = float("-inf")
    scores[0, 256:] = float("-inf")  # the last block is impossible
    n = 100_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.bincount(inverse_cdf(scores.expand(n, -1), uniform), minlength=300).double()
    law = scores[0].double().softmax(-1)
    assert counts[law == 0].sum() == 0
    keep = law * n > 5
    assert chisquare(counts[keep], law[keep] * counts[keep].sum() / law[keep].sum()).pvalue > 1e-3
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert (law[inverse_cdf(scores.expand(2, -1), edges)] > 0).all()


def test_other_attention_is_refused() -> None:
    model = tiny_model("mistral", sliding_window=16)
    short, long = SamplingSettings(temperature=0.0, max_new_tokens=8), SamplingSettings(max_new_tokens=12)
    expected = HFSampler().sample(model, PROMPTS, short, 0, **IDS)
    assert [r.ids for r in ContinuousSampler().sample(model, PROMPTS, short, 0, **IDS)] == [r.ids for r in expected]
    with pytest.raises(UserError, match=r"a sliding window of 16, prompt and reply take up to 17. Use pause_lightning"):
        ContinuousSampler().sample(model, PROMPTS, long, 0, **IDS)
