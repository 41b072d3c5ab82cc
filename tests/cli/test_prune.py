"""``secateur prune`` with every score, on a network alone and on a recipe with data."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from secateur.ablations import ABLATIONS
from secateur.checkpoint import read_model
from secateur.scores import GROUP_SCORES, SCORES

DATA = {
    "weight_gradient", "brute_force", "optimal_brain_damage", "snip", "grasp", "taylor", "activation_taylor",
    "skeletonization", "activation", "sensitivity",
}  # fmt: skip
# What no channel can be rated by here, and why.
REFUSED = {
    "karnin": "PathIntegral(model, optimizer)",
    "movement": "PathIntegral(model, optimizer)",
    "optimal_brain_surgeon": "cannot be added up over coupled units",
}
OF_CHANNELS = [n for n in dict.fromkeys((*SCORES, *GROUP_SCORES)) if n not in ("block_influence", *REFUSED)]
COMMON = ("--target", "channels=0.5", "--align", "1", "--json")


@pytest.mark.parametrize("score", OF_CHANNELS)
def test_every_score_prunes_a_recipe(workspace, call, score):
    done = call("prune", "recipe.toml", "--score", score, *COMMON)
    assert done.code == 0, done.err
    shown = done.json()
    assert shown["achieved"] == 0.5
    assert shown["proof"]["equal"]
    assert call("verify", "recipe.toml", "pruned").code == 0


@pytest.mark.parametrize("score", OF_CHANNELS)
def test_scores_of_data_refuse_a_network_alone(workspace, call, score):
    done = call("prune", "net.py:make", "--input", "2,4,4,4", "--score", score, *COMMON)
    assert done.code == (2 if score in DATA else 0)
    assert ("name a recipe or a run directory" in done.err) == (score in DATA)


@pytest.mark.parametrize("score", REFUSED)
def test_scores_of_a_training_and_of_whole_matrices_are_refused(workspace, call, score):
    done = call("prune", "recipe.toml", "--score", score, *COMMON)
    assert done.code == 2
    assert REFUSED[score] in done.err


def test_options_of_a_score(workspace, call):
    done = call(
        "prune", "recipe.toml", "-s", "sensitivity", "--score-arg", "per_mac=true", "--score-arg", "temperature=4",
        "--score-arg", "outputs=values", *COMMON,
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = (workspace / "pruned" / "plan.json").read_text()
    assert "Sensitivity(outputs='values', temperature=4, centred=True, per_mac=True" in plan


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--score", "taylr"], "did you mean 'taylor'?"),
        (["--score", "taylor", "--score-arg", "form"], "expected KEY=VALUE"),
        (["--score", "taylor", "--score-arg", "from=square"], "did you mean 'form'?"),
        (["--score", "taylor", "--score-arg", "form=squared"], "did you mean 'square'?"),
        (["--score", "magnitude", "--score-arg", "p=3"], "p is 3"),
    ],
)
def test_wrong_scores_and_options(workspace, call, options, said):
    done = call("prune", "recipe.toml", *options, *COMMON)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert not (workspace / "pruned").exists()


REFUSED_ABLATIONS = {
    "shuffle": "'shuffle' moves zeros within one layer, and units of coupled groups go from many layers at once",
    "random_masks": "'random_masks' moves zeros within one layer",
    "smaller_dense": "nothing is trained here: say prune.ablate = 'smaller_dense' in a recipe, and secateur run",
}


def test_every_ablation_is_named_in_the_help_and_works_or_is_refused(workspace, call):
    shown = " ".join(call("prune", "--help").out.replace("│", " ").split())
    for name in ABLATIONS:
        assert name in shown
        done = call("prune", "recipe.toml", "--ablate", name, *COMMON)
        assert done.code == (2 if name in REFUSED_ABLATIONS else 0), done.err
        assert REFUSED_ABLATIONS.get(name, "") in done.err
        assert (workspace / "pruned").exists() == (name not in REFUSED_ABLATIONS)
        shutil.rmtree(workspace / "pruned", ignore_errors=True)


@pytest.mark.parametrize("pattern", ["layer", "expert"])
def test_ablations_of_masks_know_no_blocks_and_experts(workspace, call, pattern):
    (workspace / "stream.py").write_text(STREAM)
    argv = ("stream.py:make", "--input", "9,5", "--pattern", pattern, *COMMON)
    done = call("prune", *argv, "--ablate", "shuffle")
    assert done.code == 2
    assert "does not know which units of" in done.err


def test_reinitialised_weights_are_those_of_the_seed_and_the_structure_is_the_methods(workspace, call):
    assert call("prune", "recipe.toml", "--out", "plain", *COMMON).code == 0
    said = call("prune", "recipe.toml", "--ablate", "reinitialise", "--ablate-arg", "seed=5", *COMMON)
    assert said.code == 0, said.err
    assert said.json()["ablation"] == "Reinitialise(seed=5)"
    plans = [json.loads((workspace / folder / "plan.json").read_text()) for folder in ("plain", "pruned")]
    assert "Reinitialise(seed=5)" in json.dumps(plans[1])
    assert json.dumps(plans[1]).replace(', "ablation": "Reinitialise(seed=5)"', "") == json.dumps(plans[0])
    torch.manual_seed(5)  # the network that these shapes make, as a constructor would
    norm = nn.BatchNorm2d(4)
    want = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).state_dict()
    got = read_model(workspace / "pruned" / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(value, want[name]) for name, value in got.items())
    failed = call("verify", "recipe.toml", "pruned")
    assert failed.code == 2
    assert "does not equal" in failed.err
    shown = call("prune", "recipe.toml", "--ablate", "reinitialise", *COMMON[:-1]).out
    assert "Ablation: Reinitialise(seed=0): all weights are new since the proof" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ablate", "shufle"], "did you mean 'shuffle'?"),
        (["--ablate", "reinitialise", "--ablate-arg", "sed=1"], "did you mean 'seed'?"),
        (["--ablate", "reinitialise", "--ablate-arg", "seed"], "expected KEY=VALUE"),
        (["--ablate", "reinitialise", "--ablate-arg", "seed=-1"], "at least 0, got -1"),
        (["--ablate", "reinitialise", "--ablate-arg", "seed=x"], "got 'x'"),
        (["--ablate-arg", "seed=1"], "--ablate-arg"),
    ],
)
def test_wrong_ablations(workspace, call, options, said):
    done = call("prune", "recipe.toml", *options, *COMMON)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert not (workspace / "pruned").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--exclude", "clasifier"], "the pattern 'clasifier' matches no parameter"),
        (["--include", "clasifier"], "the pattern 'clasifier' matches no parameter"),
        (["--out", "net.py"], "--out net.py: a file is in the way"),
        (["--input", "99999999,3,99999,99999"], "no tensor of this shape can be made"),
        (["--input", "9" * 30], "no tensor of this shape can be made"),
    ],
)
def test_what_would_do_nothing_or_fail_in_the_end_is_refused_first(workspace, call, options, said):
    done = call("prune", "recipe.toml", *options, *COMMON)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert not (workspace / "pruned").exists()


def test_a_regression_protects_values(workspace, call):
    (workspace / "net.py").write_text(
        (workspace / "net.py").read_text()
        + "\n\ndef numbers():\n    x, y = samples(40)\n    return Data(train=(x, y.float()[:, None].expand(-1, 3)), "
        "test=(x, y.float()[:, None].expand(-1, 3)))\n"
    )
    recipe = workspace / "recipe.toml"
    recipe.write_text('task = "regression"\n' + recipe.read_text().replace('"net.py:data"', '"net.py:numbers"'))
    done = call("prune", "recipe.toml", "--score", "sensitivity", *COMMON)
    assert done.code == 0, done.err
    assert "outputs='values'" in (workspace / "pruned" / "plan.json").read_text()


STREAM = """
import torch
from torch import nn


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.up = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        share, chosen = self.router(x).softmax(-1).topk(2, -1)
        return x + (torch.einsum("tkij,tj->tki", self.up[chosen], x) * share[..., None]).sum(1)


def make():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Sequential(*[Mixture() for _ in range(4)]), nn.Linear(8, 3))
"""


@pytest.mark.parametrize(("pattern", "left"), [("layer", 2), ("expert", 4)])
def test_layers_and_experts(workspace, call, pattern, left):
    (workspace / "stream.py").write_text(STREAM)
    argv = ("stream.py:make", "--input", "9,5")
    done = call("prune", *argv, "--pattern", pattern, *COMMON)
    assert done.code == 0, done.err
    shown = done.json()
    assert shown["achieved"] == 0.5
    assert shown["proof"]["equal"]
    assert shown["proof"]["bypassed"] == (2 if pattern == "layer" else 0)
    assert sum(g["kept"] for g in shown["groups"]) == left * (1 if pattern == "layer" else 2)
    assert call("verify", "stream.py:make", "pruned", "--input", "9,5").code == 0
    refused = call("prune", *argv, "--pattern", "layers", *COMMON)
    assert refused.code == 2
    assert "did you mean 'layer'?" in refused.err


def test_inspect_lists_layers_and_experts(workspace, call):
    (workspace / "stream.py").write_text(STREAM)
    shown = call("inspect", "stream.py:make", "--input", "9,5", "--groups")
    assert shown.code == 0, shown.err
    assert "1: 4 residual blocks that can go" in shown.out
    assert "1.0.router: 4 experts that can go" in shown.out
    found = call("inspect", "stream.py:make", "--input", "9,5", "--groups", "--json").json()
    assert [g["name"] for g in found["layers"]] == ["1"]
    assert set(found["experts"][0]["members"]) == {"1.0.router.weight[0]", "1.0.router.bias[0]", "1.0.up[0]"}


def test_a_pruned_folder_is_pruned_again_inspected_and_exported(workspace, call):
    (workspace / "stream.py").write_text(STREAM)
    argv = ("stream.py:make", "--input", "9,5")
    assert call("prune", *argv, "--pattern", "layer", *COMMON).code == 0
    again = call("prune", *argv, "--pruned", "pruned", "--pattern", "expert", "--out", "twice", *COMMON)
    assert again.code == 0, again.err
    assert len(json.loads((workspace / "twice" / "plan.json").read_text())["steps"]) == 2
    seen = call("inspect", *argv, "--pruned", "twice", "--json")
    assert seen.code == 0, seen.err
    assert sum(w["shape"] == [2, 8] for w in seen.json()["layers"]) == 2
    done = call("export", *argv, "--pruned", "twice", "-f", "onnx", "-f", "pt2", "--json")
    assert done.code == 0, done.err
    assert {e["format"] for e in done.json()} == {"onnx", "pt2"}
    assert all(e["max_difference"] < 1e-5 for e in done.json())
    twice = call("verify", "stream.py:make", "twice", "--input", "9,5")
    assert twice.code == 2
    assert "shrunk in 2 rounds" in twice.err
    lost = call("export", "twice", "-f", "onnx")
    assert lost.code == 2
    assert "--pruned twice" in lost.err
    wrong = call("export", "net.py:make", "--input", "1,4,4,4", "--pruned", "twice", "-f", "onnx")
    assert wrong.code == 2
    assert "the plan" in wrong.err
