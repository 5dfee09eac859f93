"""A quick start: what is put off does not run on the way to a first step, and does all that it does when it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNUSED = (
    *("sympy", "torch._dynamo.convert_frame", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("scipy.stats", "scipy.optimize", "xformers", "xformers.ops.fmha", "bitsandbytes", "pandas", "matplotlib", "cog"),
    *("transformers", "transformers.models", "diffusers.models.transformers.transformer_flux", "diffusers.hooks"),
    *("diffusers.models.autoencoders.vq_model", "diffusers.models.unets.unet_motion_model"),
)


def ran(code: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HOOK = """
import json, sys
from pathlib import Path
from trainer.args import Section
from trainer.hooks import Hook
from trainer.later import waits

class Seen(Hook):
    class Options(Section):
        file: str

    def __init__(self, context, options):
        super().__init__(context)
        self.file = Path(options.file)

    def on_step(self, run, step):
        self.file.write_text(json.dumps([name for name, module in sys.modules.items() if not waits(module)]))
"""


def test_a_first_step_has_run_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(HOOK)
    hook = {"use": f"{tmp_path / 'seen.py'}:Seen", "options": {"file": str(tmp_path / "seen")}}
    few = ["--runtime.steps", "1", "--runtime.device", "cpu", "--sample.steps", "1", "--sample.prompts", "a TOK"]
    own = ["--data.source", "testbed/quickstart/mushroom.zip", "--runtime.out", str(tmp_path), "--runtime.name", "r"]
    command = [sys.executable, "train.py", *few, *own, "--hooks.extra", json.dumps([hook])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen").read_text())
    assert "transformers.models.clip.modeling_clip" in seen  # it is a list of what ran
    assert [name for name in UNUSED if name in seen] == []


def test_names_of_transformers_are_those_of_the_package() -> None:
    code = """
from trainer import lean, later
lean.imports()
import transformers
before = {name: getattr(transformers, name) for names in lean.TRANSFORMERS.values() for name in names.split()}
assert later.waits(sys.modules["transformers"])
assert transformers.pipeline and not later.waits(sys.modules["transformers"])
whole = sys.modules["transformers"]
print(whole is not transformers, [name for name in before if getattr(whole, name) is not before[name]])
from transformers import __version__, CLIPTextModel
print(__version__ == before and 0 or __version__, CLIPTextModel is before["CLIPTextModel"])
"""
    said = ran(code).split("\n")
    assert said[0] == "True []"
    assert said[1].endswith(" True")


def test_the_list_of_installed_packages_is_read_when_it_is_asked() -> None:
    code = """
from trainer import lean
from importlib import metadata
own = metadata.packages_distributions
read = []
def counted():
    read.append(1)
    return own()
metadata.packages_distributions = counted
lean.imports()
lean.imports()
from diffusers.utils import import_utils
assert import_utils._is_package_available("torch")[0]
print(len(read))
there = import_utils._package_map
print(there == own(), there["PIL"], "no_such" in there, len(read))
"""
    assert ran(code).split("\n")[:2] == ["0", "True ['pillow'] False 1"]


def test_schedulers_still_find_scipy() -> None:
    code = """
from trainer import lean
lean.imports()
from diffusers import DPMSolverMultistepScheduler, LMSDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextModel
print('scipy.stats._stats_py' in sys.modules, 'scipy' in sys.modules)
from transformers.utils import is_scipy_available
made = DPMSolverMultistepScheduler(use_beta_sigmas=True)
made.set_timesteps(4)
LMSDiscreteScheduler().set_timesteps(4)
print(is_scipy_available(), 'scipy.stats._stats_py' in sys.modules)
"""
    assert ran(code).split() == ["False", "True", "True", "True"]


def test_the_compiler_still_compiles_and_knows_what_it_was_told_before_it_ran() -> None:
    code = """
from trainer import lean, later
lean.imports()
import torch
dynamo = sys.modules["torch._dynamo"]
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
def left(x): return x.sin()
left = torch.compiler.disable(left)
def opaque(x): return x.cos().exp()
opaque = torch.compiler.allow_in_graph(opaque)
print(later.waits(dynamo), left(torch.zeros(1)).item(), isinstance(3, torch._dynamo.eval_frame.OptimizedModule))
def whole(x): return opaque(left(x * 2) + 1)
x = torch.ones(3)
made = torch.compile(whole, backend=backend)
assert made(x).equal(whole(x))
print(later.waits(dynamo), len(graphs), any(node.target is opaque for graph in graphs for node in graph.graph.nodes))
print(isinstance(torch.compile(torch.nn.Linear(1, 1)), torch._dynamo.eval_frame.OptimizedModule))
from torch.fx.experimental.symbolic_shapes import guard_or_false, sym_eq
print(guard_or_false(True), sym_eq([1, 2], (1, 2)), sym_eq((1, 2), (1, 3)))
with torch.device("meta"):
    print(torch.nn.Conv2d(3, 4, 3)(torch.empty(2, 3, 8, 8)).shape[2])
"""
    assert ran(code).split() == ["True", "0.0", "False", "False", "2", "True", "True", "True", "True", "False", "6"]


def test_answers_before_the_algebra_is_there_are_its_own() -> None:
    code = """
from trainer import lean, later
lean.imports()
shapes = sys.modules["torch.fx.experimental.symbolic_shapes"]
ask = [("guard_or_false", (True,)), ("guard_or_true", (False,)), ("expect_true", (True,)), ("is_nested_int", (3,)),
       ("statically_known_true", (False,)), ("guard_size_oblivious", (True,)),
       ("sym_eq", ((1, 2), [1, 2])), ("sym_eq", ((1,), (1, 2))), ("sym_eq", ((1, 3), (1, 2)))]
before = [getattr(shapes, name)(*given) for name, given in ask]
print(later.waits(shapes), 'sympy' in sys.modules)
later.ran(shapes)
print(before == [getattr(shapes, name)(*given) for name, given in ask])
"""
    assert ran(code).split() == ["True", "False", "True"]


def test_only_tensors_without_values_are_left_undrawn() -> None:
    code = """
import torch
from trainer import lean
own = torch.nn.init.normal_
torch.manual_seed(0)
plain = torch.nn.Linear(3, 3).weight
torch.manual_seed(0)
with lean.undrawn():
    assert torch.nn.Embedding(2, 2, device="meta").weight.is_meta
    print(torch.nn.init.normal_ is own, torch.nn.Linear(3, 3).weight.equal(plain))
print(torch.nn.init.normal_ is own)
"""
    assert ran(code).split() == ["False", "True", "True"]


def test_garbage_is_collected_again_and_what_many_modules_made_is_set_apart() -> None:
    code = """
import gc
from trainer import lean
with lean.importing():
    print(gc.isenabled())
    import json
print(gc.isenabled(), gc.get_freeze_count())
with lean.importing():
    import torch
print(gc.isenabled(), gc.get_freeze_count() > 10000)
gc.disable()
with lean.importing(): pass
print(gc.isenabled())
"""
    assert ran(code).split() == ["False", "True", "0", "True", "True", "False"]


@pytest.mark.parametrize("package", ["xformers.ops", "bitsandbytes.nn"])
def test_optional_packages_are_whole_when_they_are_used(package: str) -> None:
    pytest.importorskip(package.partition(".")[0])
    used = {"xformers.ops": "memory_efficient_attention", "bitsandbytes.nn": "Linear8bitLt"}
    code = f"""
from trainer import lean, later
lean.imports()
from {package} import {used[package]}
import {package} as module
whole = later.ran(sys.modules[{package!r}])
print(later.waits(whole), isinstance(3, {used[package]}) if isinstance({used[package]}, (type, later.Named)) else False)
"""
    assert ran(code).split() == ["False", "False"]


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "2"), ("TEMPERA_LEAN", "0")])
def test_launched_processes_and_who_asks_for_it_have_torch_whole(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    code = """
from trainer import lean, later
lean.start()
import torch._dynamo, torch.distributed.tensor
import transformers
from transformers.utils import is_torch_distributed_available as asked
print(*(later.waits(sys.modules[name]) for name in ("torch._dynamo", "torch.distributed.tensor")), asked())
"""
    assert ran(code).split() == ["False", "False", "True"]
