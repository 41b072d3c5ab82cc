"""A whole run: what it leaves, what it refuses before training, and how it ends when interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur import Pruner, Target, prune_and_retrain
from secateur.checkpoint import load_masks, load_model, load_tree
from secateur.errors import (
    CheckpointError,
    DataError,
    RecipeError,
    SecateurError,
    SecateurWarning,
    TargetError,
    WeightError,
)
from secateur.pipeline.data import Data, batches, order_of
from secateur.pipeline.events import EventLog, Silent
from secateur.pipeline.factories import make_data, make_model
from secateur.pipeline.optim import LEARNING_RATES, Cosine, Linear, Steps
from secateur.pipeline.run import run
from secateur.pipeline.tasks import TASKS, evaluate
from secateur.recipe import from_dict
from secateur.sparse import reason as sparse_kernels_missing

from .test_resume import BASE, COUPLED, GRADUAL, ITERATIVE
from .tiny import data, net


def test_what_a_run_leaves(tmp_path: Path) -> None:
    recipe = from_dict(ITERATIVE | {"export": ["safetensors"], "measure": {"runs": 3, "warmup": 1, "energy": False}})
    done = run(recipe, tmp_path / "run", command="test", report=False)
    directory = tmp_path / "run"
    result = json.loads((directory / "result.json").read_text())
    assert result == json.loads(json.dumps(done.result))
    assert result["prune"]["asked"] == result["prune"]["goal"] == 0.8
    assert result["prune"]["achieved"] == pytest.approx(round(0.8 * 1684) / 1684, abs=1e-12)
    assert result["prune"]["finished"]
    assert result["realised"] == "mask"
    assert result["quality"]["dense"]["n"] == result["quality"]["pruned"]["n"] == 15
    assert result["profile"]["pruned"]["latency"]["runs"] == 3
    assert sum(result["histograms"]["5.weight"]["dense"]) == 1600
    masks = load_masks(directory / "masks.safetensors")
    fresh = net()
    load_model(fresh, directory / "model.safetensors")
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, done.model.get_parameter(name))
        if name in masks:
            assert int(parameter[~masks[name]].count_nonzero()) == 0
            assert sum(result["histograms"][name]["pruned"]) == int(masks[name].sum())
    kinds = [json.loads(line)["event"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["epoch"] * 3 + (["prune", "recalibrate"] + ["epoch"] * 2) * 2


@pytest.mark.skipif(bool(sparse_kernels_missing()), reason="needs the sparse kernels")
def test_a_run_ends_in_a_compiled_sparse_network_beside_other_engines(tmp_path: Path) -> None:
    fast = {"runs": 3, "warmup": 1, "energy": False}
    recipe = from_dict(ITERATIVE | {"export": ["onnx", "sparse"], "measure": fast})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)  # so small a network gains nothing, and is told so
        done = run(recipe, tmp_path / "run", report=False)
    exported = {row["format"]: row for row in done.result["exports"]}
    assert exported["sparse"]["path"] == "exports/model.sparse.safetensors"
    assert (tmp_path / "run" / exported["sparse"]["path"]).exists()
    rows = done.result["engines"]
    assert [(row["engine"], row["network"]) for row in rows[:4]] == [
        ("PyTorch", "dense"),
        ("PyTorch", "pruned"),
        ("secateur", "pruned, sparse kernels"),
        ("ONNX Runtime", "pruned"),
    ]
    assert all(row["median_ms"] > 0 and row["runs"] == 3 for row in rows)
    assert any("layers packed" in note for note in done.result["notes"])


def test_a_finished_run_resumed_gives_the_same(tmp_path: Path) -> None:
    recipe = from_dict(GRADUAL)
    first = run(recipe, tmp_path, report=False)
    again = run(recipe, tmp_path, resume=True, report=False)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert first.result["quality"] == again.result["quality"]
    assert "dense" not in first.result["quality"]
    assert any("no dense network" in note for note in first.result["notes"])


@pytest.mark.parametrize("when", ["during", "rounds"])
def test_coupled_channels_end_in_the_smaller_network(when: str, tmp_path: Path) -> None:
    recipe = COUPLED
    if when == "rounds":
        recipe = BASE | {
            "prune": {
                "target": {"channels": 0.5},
                "pattern": {"name": "channel", "coupled": True, "align": 2},
                "allocate": {"name": "layerwise"},
                "schedule": {"name": "iterative", "rounds": 2},
            },
            "recover": {"retrain": {"name": "learning_rate_rewinding", "epochs": 1}},
        }
    done = run(from_dict(recipe), tmp_path / "run", report=True)
    result, prune = done.result, done.result["prune"]
    assert result["realised"] == "slice"
    assert prune["finished"]
    assert prune["achieved"] <= prune["asked"] == prune["goal"] == 0.5
    assert not [note for note in result["notes"] if "not" in note and "cut" in note]
    small = net()
    from secateur.structure import load_pruned

    load_pruned(small, tmp_path / "run" / "pruned")
    masked = sum(int((~mask).sum()) for mask in done.masks.values())
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in net().parameters()) - masked
    groups = {g["name"]: g["kept"] for g in prune["groups"]}
    assert (small[0].out_channels, small[5].out_features) == (groups["0"], groups["5"])
    assert groups["0"] < 4 or groups["5"] < 16
    images = data().test[0]
    torch.testing.assert_close(small.eval()(images), done.model.eval()(images), rtol=1e-4, atol=1e-5)
    macs = [result["profile"][which]["macs"]["dense"] for which in ("dense", "pruned")]
    if when == "during":
        assert prune["achieved"] == pytest.approx(macs[1] / macs[0])


def test_gradual_pruning_in_the_retraining(tmp_path: Path) -> None:
    recipe = from_dict(
        BASE
        | {
            "prune": {
                "target": {"sparsity": 0.9},
                "schedule": {"name": "linear", "begin": 0, "end": 2, "every": 0.5, "unit": "epochs"},
            },
            "recover": {"retrain": {"name": "fine_tune", "epochs": 3, "lr": 0.01}},
        }
    )
    done = run(recipe, tmp_path, report=False)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    levels = [e["sparsity"] for e in events if e["event"] == "prune"]
    assert levels == sorted(levels)
    assert levels[-1] == pytest.approx(0.9, abs=1e-3)
    assert all(e["phase"] == "retrain" for e in events if e["event"] == "prune")
    assert {e["lr"] for e in events if e["event"] == "epoch" and e["phase"] == "retrain"} == {0.01}
    assert done.result["quality"]["dense"]["accuracy"] > 0


REFUSED: dict[str, tuple[dict[str, Any], type[SecateurError], str]] = {
    "fine-tuning at no learning rate": (
        {
            "train": {"epochs": 2, "lr_schedule": {"name": "cosine"}},
            "prune": {"target": {"sparsity": 0.5}},
            "recover": {"retrain": {"name": "fine_tune", "epochs": 1}},
        },
        RecipeError,
        "say recover.retrain.lr",
    ),
    "a schedule in steps that outlasts the training": (
        {
            "prune": {
                "target": {"sparsity": 0.5},
                "when": "during",
                "schedule": {"name": "cubic", "begin": 0, "end": 100, "unit": "steps", "every": 10},
            }
        },
        RecipeError,
        "ends at step 100, but train.epochs has 3 epochs of 6 steps, 18 in all",
    ),
    "no clock for the schedule": (
        {
            "train": {"epochs": 0},
            "prune": {"target": {"sparsity": 0.5}, "when": "during", "schedule": {"name": "one_shot", "unit": "steps"}},
        },
        RecipeError,
        "ends at step 0, but train.epochs has 0 epochs",
    ),
    "a target out of reach": (
        {"prune": {"target": {"compression_ratio": 1000.0}}},
        TargetError,
        "the highest compression ratio",
    ),
    "N:M on an odd layer": ({"prune": {"pattern": "nm"}}, SecateurError, "multiple of 4, got 1"),
    "a pattern that matches nothing": (
        {"prune": {"target": {"sparsity": 0.5}, "exclude": ["fc*"]}},
        SecateurError,
        "fc*",
    ),
    "a module that is not there": (
        {"model": {"factory": "no_such_module:net"}},
        RecipeError,
        "no module 'no_such_module'",
    ),
    "a name that is not there": (
        {"model": {"factory": "tests.pipeline.tiny:nett"}},
        RecipeError,
        "did you mean 'net'?",
    ),
    "a file that is not there": ({"data": {"factory": "nowhere.py:data"}}, RecipeError, "no file"),
    "wrong arguments": ({"model": {"factory": "tests.pipeline.tiny:net", "args": {"w": 1}}}, RecipeError, "model.args"),
    "not a model": ({"model": {"factory": "tests.pipeline.tiny:data"}}, DataError, "expected a torch.nn.Module"),
    "not data": ({"data": {"factory": "tests.pipeline.tiny:net"}}, DataError, "expected secateur.Data"),
    "weights that are not there": (
        {"model": {"factory": "tests.pipeline.tiny:net", "weights": "none.safetensors"}},
        CheckpointError,
        "none.safetensors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_training(name: str, tmp_path: Path) -> None:
    changes, kind, words = REFUSED[name]
    steps: list[int] = []

    class Count(Silent):
        """Counts optimizer steps."""

        def progress(self, done: int, total: int, text: str) -> None:
            steps.append(done)

    with pytest.raises(kind) as error:
        run(from_dict(ITERATIVE | {"recover": {}} | changes), tmp_path / "r", listener=Count(), report=False)
    assert words in str(error.value)
    assert not steps


def test_divergence_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    recipe = ITERATIVE | {"train": {"epochs": 3, "optimizer": {"name": "sgd", "lr": 1e30}}}
    with pytest.raises(DataError, match=r"lower train\.optimizer\.lr"):
        run(from_dict(recipe), tmp_path, report=False)


def test_ctrl_c_leaves_a_checkpoint_and_130(tmp_path: Path) -> None:
    recipe = from_dict(ITERATIVE | {"train": ITERATIVE["train"] | {"epochs": 100_000}, "recover": {}})
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-m", "secateur", "run", str(path), "--out", str(tmp_path / "out")],
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        # A shell's background job hands SIGINT down ignored, and Python would leave it so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "checkpoint.safetensors").exists():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors


def test_the_event_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "m.jsonl")
    log.write({"event": "a"})
    known = log.size
    log.write({"event": "b"})
    again = EventLog(tmp_path / "m.jsonl", size=known)
    assert [e["event"] for e in again.read()] == ["a"]


def test_batches_cover_every_sample_once_in_both_kinds_of_split() -> None:
    inputs, targets = torch.arange(10.0).unsqueeze(1), torch.arange(10)
    order = order_of((inputs, targets), 3, "train", 0)
    assert sorted(order.tolist()) == list(range(10))
    assert not torch.equal(order, order_of((inputs, targets), 3, "train", 1))
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    for start in (0, 2):
        plain = [b[1].tolist() for b in batches((inputs, targets), 4, order=order, start=start)]
        mapped = [b[1].tolist() for b in batches(dataset, 4, order=order, start=start)]
        assert plain == mapped
        assert [i for part in plain for i in part] == order.tolist()[4 * start :]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ((torch.zeros(3, 1), torch.zeros(2)), "3 inputs but 2 targets"),
        ((torch.zeros(0, 1), torch.zeros(0)), "is empty"),
        ((torch.zeros(3, 1),), "expected (inputs, targets)"),
        (iter([1]), "map-style"),
    ],
)
def test_data_that_cannot_be_used(train: Any, words: str) -> None:
    with pytest.raises(DataError) as error:
        Data(train=train, test=(torch.zeros(1, 1), torch.zeros(1)))
    assert words in str(error.value)


def test_figures_against_a_loop() -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(4, 12), (torch.randn(23, 4), torch.randint(12, (23,)))
    got = evaluate(model, (x, y), TASKS["classification"](), batch_size=5)
    out = model(x).detach()
    assert got["n"] == 23
    assert got["accuracy"] == pytest.approx(sum(int(o.argmax()) == int(t) for o, t in zip(out, y, strict=True)) / 23)
    top5 = sum(int(t) in o.topk(5).indices.tolist() for o, t in zip(out, y, strict=True)) / 23
    assert got["top5_accuracy"] == pytest.approx(top5)
    assert got["loss"] == pytest.approx(float(nn.functional.cross_entropy(out, y)), rel=1e-5)
    target = torch.randn(23)
    regressor = nn.Linear(4, 1)
    errors = evaluate(regressor, (x, target), TASKS["regression"](), batch_size=7)
    assert errors["loss"] == pytest.approx(float((regressor(x)[:, 0] - target).square().mean().detach()), rel=1e-5)
    assert errors["mean_absolute_error"] == pytest.approx(
        float((regressor(x)[:, 0] - target).abs().mean().detach()), rel=1e-5
    )


def test_learning_rates_by_hand() -> None:
    assert set(LEARNING_RATES) == {"constant", "cosine", "linear", "steps"}
    assert Cosine()(0, 10) == 1.0
    assert Cosine()(5, 10) == pytest.approx(0.5)
    assert Cosine(end=0.1)(10, 10) == pytest.approx(0.1)
    assert Linear()(7.5, 10) == pytest.approx(0.25)
    assert Steps((2, 4))(3.9, 10) == pytest.approx(0.1)
    assert Steps((2, 4), factor=0.5)(4, 10) == pytest.approx(0.25)
    assert Cosine(warmup=2)(0, 10) == pytest.approx(0.05)
    assert Cosine(warmup=2)(2, 10) == 1.0


def test_factories_take_a_file_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(Path(__file__).with_name("tiny.py").read_text())
    assert isinstance(make_model("mine.py:net", {}, base=tmp_path), nn.Module)
    assert len(make_data("mine.py:data", {"n": 8}, base=tmp_path).train[0]) == 6  # type: ignore[index]


def test_a_model_and_data_in_hand_instead_of_factories(tmp_path: Path) -> None:
    model = net()
    done = run(from_dict(GRADUAL), tmp_path, model=model, data=data(), report=False)
    assert done.model is model


def test_a_refused_recipe_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run(from_dict(GRADUAL | {"model": BASE["model"] | {"weights": "none.safetensors"}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(from_dict(GRADUAL), tmp_path / "out", report=False)


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "dense.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="is not empty"):
        run(from_dict(GRADUAL), tmp_path)
    assert (tmp_path / "dense.safetensors").read_text() == "precious"
    with pytest.raises(CheckpointError, match="no run to go on with"):
        run(from_dict(GRADUAL), tmp_path / "nothing", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        run(from_dict(GRADUAL), tmp_path / "file")


def test_a_last_batch_of_one_is_refused_where_it_cannot_be_normalised(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    recipe = from_dict(GRADUAL | {"data": BASE["data"] | {"batch_size": 11}})  # 45 = 4 * 11 + 1
    with pytest.raises(RecipeError, match="last batch of one"):
        run(recipe, tmp_path / "out", model=model, data=data())


def test_pruned_weights_that_came_back_are_noticed() -> None:
    model = nn.Linear(8, 4)

    def forgetful(model: nn.Module, number: int) -> None:
        torch.nn.init.ones_(model.get_parameter("weight"))

    with pytest.raises(WeightError, match=r"call pruner\.attach"):
        prune_and_retrain(Pruner(model, Target("sparsity", 0.5)), retrain=forgetful)


def test_a_file_with_dataclasses_and_postponed_annotations_loads(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n\n\n"
        "@dataclass\nclass Config:\n    width: int = 3\n\n\n"
        "def net() -> nn.Module:\n    return nn.Linear(Config().width, 1)\n"
    )
    assert make_model("mine.py:net", {}, base=tmp_path).in_features == 3


@pytest.mark.parametrize("score", ["karnin", "movement", "synflow", "snip", "grasp", "optimal_brain_damage", "lamp"])
def test_saliencies_by_name(score: str, tmp_path: Path) -> None:
    """The run finds what a score looks at by itself: the training, the inputs' shape, batches."""
    recipe = from_dict(ITERATIVE | {"prune": ITERATIVE["prune"] | {"score": score}})
    done = run(recipe, tmp_path / "run", report=False)
    assert done.result["prune"]["achieved"] == pytest.approx(0.8, abs=1e-3)
    magnitude = run(from_dict(ITERATIVE), tmp_path / "magnitude", report=False)
    assert any(not torch.equal(mask, magnitude.masks[name]) for name, mask in done.masks.items())


def test_a_watched_run_prunes_as_the_path_says(tmp_path: Path) -> None:
    """The first round's masks are those of a path integral in a loop that is written out."""
    from secateur import Method, prune_
    from secateur.scores import Karnin
    from secateur.stats import PathIntegral

    one = ITERATIVE | {
        "prune": {"target": {"sparsity": 0.8}, "score": "karnin"},
        "recover": {"retrain": "nothing", "batch_norm": "nothing"},
    }
    seen = []

    class Spy(Silent):
        def progress(self, done: int, total: int, text: str) -> None:
            seen.append(text)

    done = run(from_dict(one), tmp_path / "run", report=False, listener=Spy())
    fresh = net()
    load_model(fresh, tmp_path / "run" / "dense.safetensors")
    tree = load_tree(tmp_path / "run" / "checkpoint.safetensors")["trajectory"]
    assert tree["steps"] == sum("train" in text for text in seen) == 18
    path = PathIntegral(fresh)
    path.load_state_dict(tree)
    ours = prune_(fresh, Method(target=Target("sparsity", 0.8), score=Karnin(path=path)))
    assert all(torch.equal(ours.masks[name], mask) for name, mask in done.masks.items())


def test_a_score_that_watches_needs_a_training(tmp_path: Path) -> None:
    untrained = ITERATIVE | {"train": {"epochs": 0}, "prune": ITERATIVE["prune"] | {"score": "movement"}}
    untrained = untrained | {"recover": {"retrain": {"name": "fine_tune", "epochs": 1}}}
    with pytest.raises(SecateurError, match="seen no step"):
        run(from_dict(untrained), tmp_path / "run", report=False)
