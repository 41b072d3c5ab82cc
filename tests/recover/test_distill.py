"""Distillation against its closed form, and what a recipe that distils does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipeline.test_resume import BASE, DISTILLED, GRADUAL
from tests.pipeline.tiny import data, net
from torch import Tensor, nn

from secateur.checkpoint import load_weights, save_model
from secateur.errors import DataError, RecipeError, SecateurError
from secateur.pipeline.distill import Distiller
from secateur.pipeline.run import run
from secateur.pipeline.tasks import TASKS
from secateur.recipe import from_dict
from secateur.recover import DISTILLATIONS, Distillation, Outputs, SoftTargets, distillation_loss
from secateur.report.words import retrain_words


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4), (2, 5, 3, 3)])
def test_value_and_gradient_in_closed_form(shape: tuple[int, ...], temperature: float) -> None:
    source = torch.Generator().manual_seed(1)
    z, d = (3 * torch.randn(shape, dtype=torch.float64, generator=source) for _ in range(2))
    z.requires_grad_()
    d.requires_grad_()
    loss = distillation_loss(z, d, temperature)
    loss.backward()
    assert d.grad is None
    # Classes last, samples and positions in rows: numpy knows nothing of the rest.
    rows, teacher = (t.detach().movedim(1, -1).reshape(-1, 5).numpy() for t in (z, d))
    p, q = softmax(rows / temperature), softmax(teacher / temperature)
    assert float(loss.detach()) == pytest.approx(temperature**2 * (q * np.log(q / p)).sum() / len(rows), rel=1e-10)
    assert z.grad is not None
    np.testing.assert_allclose(
        z.grad.movedim(1, -1).reshape(-1, 5).numpy(), temperature * (p - q) / len(rows), rtol=1e-9, atol=1e-15
    )
    assert float(distillation_loss(z.detach().movedim(1, -1), d.movedim(1, -1), temperature, dim=-1)) == pytest.approx(
        float(loss.detach()), rel=1e-12
    )


def test_hot_teachers_are_matched_like_logits() -> None:
    """For T to infinity T^2 KL becomes the squared distance of centred logits over 2 C: the factor is right."""
    source = torch.Generator().manual_seed(2)
    z, d = (torch.randn(6, 4, dtype=torch.float64, generator=source) for _ in range(2))
    centred = (z - d) - (z - d).mean(1, keepdim=True)
    expected = float(centred.square().sum(1).mean()) / (2 * 4)
    assert float(distillation_loss(z, d, 1e4)) == pytest.approx(expected, rel=1e-3)


def test_outputs_are_compared_one_by_one() -> None:
    z, d = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    loss = Outputs()(z, d)
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * (z.detach() - d) / 15)


def test_registered_parts_are_distillations_and_zero_at_the_teacher() -> None:
    z = torch.randn(4, 3)
    for factory in DISTILLATIONS.values():
        part = factory()
        assert isinstance(part, Distillation)
        assert part == factory()
        assert float(part(z, z.clone())) == 0.0
        assert float(part(z, z + torch.randn(4, 3))) > 0.0


REFUSED: tuple[tuple[Any, type[SecateurError], str], ...] = (
    (
        lambda: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4)),
        DataError,
        r"\(2, 3\) and the teacher's \(2, 4\)",
    ),
    (lambda: Outputs()(torch.zeros(2, 1), torch.zeros(2)), DataError, "same question"),
    (lambda: Outputs()(torch.zeros(2), (torch.zeros(2),)), DataError, "the teacher's outputs are a tuple"),
    (lambda: distillation_loss({"z": torch.zeros(2)}, torch.zeros(2)), DataError, "the network's outputs are a dict"),
    (lambda: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), dim="1"), DataError, "dim must be a whole number"),
    (lambda: distillation_loss(torch.zeros(3), torch.zeros(3)), DataError, "no classes in dimension 1"),
    (lambda: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), dim=2), DataError, "dimension 2"),
    (lambda: distillation_loss(torch.ones(2, 3).long(), torch.ones(2, 3).long()), DataError, "floating-point"),
    (lambda: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0), RecipeError, "above 0"),
    (lambda: SoftTargets(temperature=float("inf")), RecipeError, "above 0"),
    (lambda: SoftTargets(weight=1.5), RecipeError, "distill: weight must be a number of at least 0 and at most 1, got"),
    (lambda: Outputs(weight=-0.1), RecipeError, "distill: weight must be a number of at least 0 and at most 1, got"),
)


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused(number: int) -> None:
    call, kind, words = REFUSED[number]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_a_divergence_is_that_of_the_same_numbers(dtype: torch.dtype) -> None:
    """Near zero the two logarithms differ by less than their own rounding: it came out negative."""
    teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    student = (teacher.float() + 0.05 * torch.randn(64, 10, generator=torch.Generator().manual_seed(1))).to(dtype)
    p, q = (z.double().softmax(1) for z in (student, teacher))
    wanted = (q * (q / p).log()).sum(1).mean()
    assert float(distillation_loss(student, teacher)) == pytest.approx(float(wanted), rel=1e-3)


def test_the_mixed_loss_and_the_teacher_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, student = net(), net()
    save_model(tmp_path / "dense.safetensors", dense)
    inputs, labels = data().train  # type: ignore[misc]
    distiller = Distiller(SoftTargets(0.3, 4.0), TASKS["classification"](), tmp_path / "dense.safetensors")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.train()
    torch.manual_seed(5)
    loss = distiller.loss(student, (inputs, labels))
    loss.backward()
    drawn = torch.get_rng_state()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]

    student.load_state_dict(before)
    student.zero_grad()
    torch.manual_seed(5)
    outputs = student(inputs)
    assert torch.equal(torch.get_rng_state(), drawn)  # the teacher drops nothing out
    answers = dense.eval()(inputs).detach()
    expected = 0.7 * nn.functional.cross_entropy(outputs, labels) + 0.3 * distillation_loss(outputs, answers, 4.0)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for ours, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)
    assert distiller._teacher is not None
    assert all(p.grad is None and not p.requires_grad for p in distiller._teacher.parameters())
    assert all(torch.equal(v, distiller._teacher.state_dict()[n]) for n, v in dense.state_dict().items())


def test_a_recipe_that_only_listens_to_the_dense_network(tmp_path: Path) -> None:
    """Weight 1 on labels that lie: the retrained network follows the teacher all the same."""
    recipe = from_dict(
        BASE
        | {
            "train": BASE["train"] | {"epochs": 12},
            "prune": {"target": {"sparsity": 0.5}},
            "recover": {
                "retrain": {"name": "learning_rate_rewinding", "epochs": 12},
                "distill": {"weight": 1.0, "temperature": 2.0},
            },
        }
    )
    done = run(recipe, tmp_path, report=False)
    dense = net()
    load_weights(dense, tmp_path / "dense.safetensors")
    images = data().train[0]  # type: ignore[index]
    with torch.no_grad():
        far: dict[str, Tensor] = {"dense": dense.eval()(images), "pruned": done.model.eval()(images)}
    agree = float((far["dense"].argmax(1) == far["pruned"].argmax(1)).float().mean())
    assert agree > 0.85
    assert any("learnt from the dense network" in note for note in done.result["notes"])
    assert "learning from the dense network" in retrain_words(done.result["recipe"])
    # The loss that is logged is the mixed one: with weight 1 it is the distance to the teacher.
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [e["train_loss"] for e in events if e["event"] == "epoch" and e["phase"] == "retrain"]
    assert losses[-1] < losses[0]


def test_distilling_while_pruning_from_given_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_model(tmp_path / "given.safetensors", net())
    changes = {
        "model": BASE["model"] | {"weights": str(tmp_path / "given.safetensors")},
        "recover": {"distill": {"name": "outputs", "weight": 1.0}},
    }
    plain, taught = (
        run(from_dict(GRADUAL | changes | more), tmp_path / name, report=False)
        for name, more in (("plain", {"recover": {}}), ("taught", {}))
    )
    given = net()
    load_weights(given, tmp_path / "given.safetensors")
    images = data().train[0]  # type: ignore[index]
    with torch.no_grad():
        wanted = given.eval()(images)
        gaps = [float((m.model.eval()(images) - wanted).square().mean()) for m in (taught, plain)]
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recover": {"distill": {"weight": 0.5}}}, "recover.retrain is 'nothing'"),
        ({"task": "regression"}, "use {name = 'outputs'}"),
        (GRADUAL | {"recover": DISTILLED["recover"]}, "there is none"),
        (
            {"recover": DISTILLED["recover"] | {"distill": {"weight": 2.0}}},
            "distill: weight must be a number of at least 0 and at most 1, got 2.0",
        ),
        ({"recover": DISTILLED["recover"] | {"distill": {"temprature": 2.0}}}, "did you mean 'temperature'?"),
        ({"recover": DISTILLED["recover"] | {"distill": "soft_target"}}, "did you mean 'soft_targets'?"),
        ({"recover": DISTILLED["recover"] | {"distill": 3}}, "expected a name or a table"),
    ],
)
def test_refused_in_a_recipe(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        from_dict(DISTILLED | changes)
    assert words in str(error.value)


def test_the_recipe_says_what_was_meant() -> None:
    assert from_dict(DISTILLED).to_dict()["recover"]["distill"] == {"name": "soft_targets", "weight": 0.7}
    assert from_dict(from_dict(DISTILLED).to_dict()) == from_dict(DISTILLED)
    outputs = from_dict(DISTILLED | {"task": "regression", "recover": DISTILLED["recover"] | {"distill": "outputs"}})
    assert outputs.recover.build_distillation() == Outputs()
