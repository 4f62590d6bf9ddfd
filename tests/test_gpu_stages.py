"""What the stages of `make gpu` run, with small inputs on the CPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device, measure
from benchmarks.gpu import kernel_table, once, ops, peers, products, step, steps, sweeps, tools, training
from benchmarks.gpu.folder import Folder, records_of
from benchmarks.gpu.kernel_table import Launch, table_of
from tests.runs import REPOSITORY

CPU = torch.device("cpu")
# The stages are rehearsed here; on a machine with a GPU `make gpu` is the test.
rehearsed = pytest.mark.skipif(device.ON_GPU, reason="a rehearsal is for a machine without a GPU")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A session's folder; what the machine reaches at best takes seconds to measure, and is made up."""
    for module in (measure, steps):
        monkeypatch.setattr(module, "product_rate", lambda: 1e11)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda: 1e10)
    return Folder(tmp_path / "out", "stage")


def records(folder: Folder, kind: str) -> list[dict[str, Any]]:
    return [record for record in records_of(folder.path) if record["kind"] == kind]


# In the order of a step: name → what it is for. Names as a H100 has them.
STEP = (
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>", "LayerNorm"),
    ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "trunk products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "trunk products"),
    ("forward_kernel", "attention"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, char*>", "additions"),
    ("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl(at::TensorIter", "GELU"),
    ("prepare_kernel", "loss kernels"),
    ("gather_kernel", "loss kernels"),
    ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", "vocabulary products"),
    ("whole_rows_kernel", "loss kernels"),
    ("nvjet_sm90_tss_320x128_64x3_1x2_h_bz_coopB_NNT", "vocabulary products"),
    ("Memset (Device)", "casts and copies"),
    ("nvjet_sm90_tss_320x128_64x3_1x2_h_bz_coopB_NTT", "vocabulary products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "vocabulary products"),
    ("finish_rows_kernel", "loss kernels"),
    ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "trunk products"),
    ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 32u>", "LayerNorm"),
    ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::Tens", "casts and copies"),
    ("void at::native::(anonymous namespace)::compute_grad_weight<float, long>(long const*", "embedding"),
    ("void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSortOnesweepKernel<at_cuda", "embedding"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerT", "AdamW and clipping"),
    ("m4k::masking::(anonymous namespace)::fill_kernel(m4k::masking::FillArgs)", "masking"),
    ("triton_per_fused__to_copy_add_native_layer_norm_backward_4", "LayerNorm"),
    ("triton_poi_fused_gelu_gelu_backward_17", "GELU"),
    ("void at::native::elementwise_kernel<128, 4, BitwiseAndFunctor>", "others"),
)
OURS = {"forward_kernel": "cross_modal_attention"} | dict.fromkeys(
    ("prepare_kernel", "gather_kernel", "whole_rows_kernel", "finish_rows_kernel"), "linear_cross_entropy"
)


def test_what_kernels_are_for() -> None:
    """By name, and the products of the vocabulary by their place beside the loss's kernels."""
    launches = [Launch(name, start=float(n), seconds=1e-6 * (n + 1)) for n, (name, _) in enumerate(STEP)]
    assert kernel_table.categories_of(launches, OURS) == [category for _, category in STEP]
    twice = [launch._replace(start=launch.start + 100 * replay) for replay in (1, 0) for launch in launches]
    table = table_of(twice, 2, OURS)
    assert table.launches == len(STEP)
    assert table.milliseconds == pytest.approx(sum(range(1, len(STEP) + 1)) / 1e3)
    assert sum(count for _, count in table.categories.values()) == table.launches
    reductions = [row for row in table.rows if "splitKreduce" in row.name]
    assert {(row.category, row.launches) for row in reductions} == {("trunk products", 1), ("vocabulary products", 1)}
    assert table.rows == sorted(table.rows, key=lambda row: -row.milliseconds)
    assert table.lines()[0].startswith("0.325 ms of kernels a step, 25 launches")


def test_our_kernels_are_found() -> None:
    pytest.importorskip("triton")
    found = kernel_table.our_kernels()
    assert found["whole_rows_kernel"] == found["gather_kernel"] == "linear_cross_entropy"
    assert found["grad_kv_kernel"] == "cross_modal_attention"
    assert found["norm_forward_kernel"] == "layer_norm"
    # A profile tells kernels apart by their names.
    assert [name for name, op in found.items() if " or " in op and name.endswith("_kernel")] == []


@rehearsed
def test_a_profile_becomes_a_table(folder: Folder) -> None:
    """Of what torch.profiler gives, here of a CPU; what a host marks is no kernel."""
    a, norm = torch.randn(64, 64), torch.nn.LayerNorm(64)
    table = kernel_table.keep_table(folder, "a title", lambda: norm(a @ a))
    assert table.categories["trunk products"][1] == 1  # aten::mm
    assert table.categories["LayerNorm"][0] > 0
    assert records(folder, "kernels")[0]["milliseconds"] == pytest.approx(table.milliseconds)
    assert {row["name"] for row in records(folder, "kernel")} >= {"aten::mm", "aten::native_layer_norm"}
    assert "a title" in (folder.path / "kernels.txt").read_text()

    class Event:
        class device_type:
            name = "CUDA"

        class time_range:
            start = 5.0
            elapsed_us = staticmethod(lambda: 3.0)

        def __init__(self, name: str) -> None:
            self.name = name

    events = [Event("forward_kernel"), Event("Optimizer.step#AdamW.step")]
    assert kernel_table.launches_of(events, "CUDA") == [Launch("forward_kernel", 5e-6, 3e-6)]
    assert kernel_table.launches_of(events, "CPU") == []


def test_every_op_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new op is found without being named; it needs inputs there or a benchmark."""
    for small in (True, False):
        assert set(ops.checks(small=small)) <= set(ops.ops())
    for op in ops.ops():
        assert op in ops.checks(small=True) or (REPOSITORY / f"benchmarks/bench_{op}.py").is_file(), op


@rehearsed
def test_ops_against_float64(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right passes; what is not is told, and stops nothing; an op without inputs runs its benchmark's."""
    monkeypatch.setattr(ops, "ops", lambda: ["linear", "quantize_coords", "embedding", "unheard_of"])
    known = ops.checks(small=True)
    right = known["embedding"][0]

    def wrong(inputs: Any, backend: str) -> list[torch.Tensor]:
        return [x * (1.001 if backend == "cpp" else 1.0) for x in right.run(inputs, backend)]

    broken = {"linear": known["linear"], "embedding": [right._replace(run=wrong)]}
    monkeypatch.setattr(ops, "checks", lambda small: broken)
    monkeypatch.setattr(ops, "backends", lambda op: ("cpp", "reference"))
    ops.run(folder)
    assert [failure.split(",")[0] for failure in folder.failures] == ["embedding", "unheard_of"]
    done = [(r["op"], r["backend"], r["dtype"]) for r in records(folder, "op")]
    assert ("linear", "cpp", "bfloat16") in done
    assert ("embedding", "reference", "float32") in done
    assert ("quantize_coords", "cpp", "its own") in done
    assert "neither inputs" in records(folder, "failure")[1]["error"]


@rehearsed
def test_every_kernel_once(capsys: pytest.CaptureFixture) -> None:
    assert once.run(large=False) >= len(ops.ops())
    assert once.run(large=True) == len(once.COUNTED)


@rehearsed
def test_forms_of_the_step(folder: Folder) -> None:
    """Losses of one size after as many steps are the same, however the step is run; a table of what it is made of."""
    for form in (steps.Form("captured", 96), steps.Form("auto", 96, rounds=2), steps.Form("reference", 96, rounds=2)):
        steps.measured(folder, form)
    steps.tables(folder)
    assert folder.failures == []
    captured, eager, reference = records(folder, "step")
    assert captured["losses"] == eager["losses"]
    assert reference["losses"] == pytest.approx(captured["losses"], rel=2e-2)
    assert captured["samples_a_second"] == pytest.approx(2e3 / captured["milliseconds"])
    assert [(r["case"], r["provider"]) for r in records(folder, "time")][1] == ("M4, 96 samples", "auto")
    assert [r["title"] for r in records(folder, "kernels")] == ["M4, 96 samples, captured", "M4, 480 samples, captured"]


def test_products_of_the_step() -> None:
    """All linear layers of M4, as the packed FLOP count has them."""
    config = step.recipe(2, 1).config.model_config()
    layers = products.layers_of(config)
    assert sum(layer.number for layer in layers) == 8 * 4 + 1 + 8 * 7
    weights = {
        side: sum(x.number * x.columns * x.depth for x in layers if x.side == side) for side in ("encoder", "decoder")
    }
    from m4.model.flops import training_flop

    assert 6 * weights["encoder"] == training_flop(config, 1, [0] * 4)
    assert 6 * (weights["decoder"] + 65536 * 640) == training_flop(config, 0, [1, 0, 0, 0])
    layer = products.Layer("x", "encoder", 6, 4, 2)
    assert [(p.rows, p.depth, p.columns, p.run().shape) for p in products.products_of(layer, 8)] == [
        (8, 4, 6, (8, 6)),
        (8, 6, 4, (8, 4)),
        (6, 8, 4, (6, 4)),
    ]


@rehearsed
def test_products_and_workspaces_are_kept(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BATCHES", (96,))
    monkeypatch.setattr(sweeps, "WORKSPACES", (64,))
    products.run(folder)
    sweeps.run(folder)
    assert folder.failures == []
    (sums,) = records(folder, "products")
    trunk = [r for r in records(folder, "product") if r["of"].startswith("trunk")]
    assert sums["trunk_ms"] == pytest.approx(sum(r["microseconds"] * r["number"] for r in trunk) / 1e3)
    assert len(records(folder, "workspace")) == 2 * len(sweeps.ROWS)


def test_peers_in_their_order(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the goals name first, what has to be compiled after it, a loop over samples last; one lacking package costs
    its benchmark alone."""
    monkeypatch.setitem(sys.modules, "benchmarks.bench_frame_selection", None)
    monkeypatch.delitem(sys.modules, "benchmarks.bench_frame_selection")
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    known = peers.suites(folder)
    assert folder.failures == []
    assert [r["what"] for r in records(folder, "absent")] == ["bench_frame_selection"]
    planned = peers.planned(known, on_gpu=True)
    assert len(set(planned)) == len(planned)
    assert [entry for n, entry in enumerate(planned) if n == 0 or entry[0] != planned[n - 1][0]][:4] == [
        ("mask_tokens", "M4 batch 96", "cpp"),
        ("quantize_coords", "1,000,000 samples", "cpp"),
        ("cross_modal_attention", "encoder, batch 96", "cpp"),
        ("linear_cross_entropy", "M4 batch 96 (9,120 tokens)", "cpp"),
    ]
    assert planned[-1][2] in peers.COMPILED
    for op, case in peers.REHEARSED:
        assert case in known[op].cases
    assert {entry[:2] for entry in peers.planned(known, on_gpu=False)} == set(peers.REHEARSED)


def test_launches_are_changed_one_at_a_time() -> None:
    pytest.importorskip("triton")
    from m4kernels.ops.cross_modal_attention import triton as backend

    own = backend.LAUNCHES[2, 64]
    tried = list(sweeps.choices(backend.LAUNCHES, (2, 64)))
    assert {kernel for kernel, _, _ in tried} == set(own._fields)
    for kernel, choice, launches in tried:
        changed = [name for name in own._fields if getattr(own, name) != getattr(launches, name)]
        assert changed == ([] if launches is own else [kernel])
        assert tuple(getattr(getattr(launches, kernel), part) for part in sweeps.PARTS) == choice


@rehearsed
def test_training(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WAYS", tuple((*way[:4], 20) for way in training.WAYS))
    training.run(folder)
    assert folder.failures == []
    losses = {r["name"]: r["losses"] for r in records(folder, "training")}
    assert set(losses) == {way[0] for way in training.WAYS}
    assert all(set(found) == {"1", "20"} for found in losses.values())
    assert losses["reference, fp32"]["20"] == pytest.approx(losses["eager, fp32"]["20"], rel=1e-4)
    assert records(folder, "run")[0]["evaluation"]["loss"] > 0
    monkeypatch.setattr(training, "ALLOWED", -1.0)
    monkeypatch.setattr(training, "run_whole", lambda *_: {})
    training.run(folder)
    assert folder.failures == ["bfloat16 learns as float32 does"]


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_programs_of_cuda(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them that is said; what they find is a failure; counters are read from ncu's table."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "bin").mkdir()
    if not Path("/usr/local/cuda/bin/ncu").exists():
        monkeypatch.setenv("PATH", "/bin:/usr/bin")
        tools.memcheck(folder)
        tools.counters(folder)
        assert [r["what"] for r in records(folder, "absent")] == ["memcheck", "counters"]
        assert folder.failures == []
    monkeypatch.setattr(tools, "program", lambda name: str(tmp_path / "bin" / name))
    checker = tmp_path / "bin/compute-sanitizer"
    script(checker, 'echo "$@"; echo "========= ERROR SUMMARY: 0 errors"')
    tools.memcheck(folder)
    assert folder.failures == []
    assert "benchmarks.gpu.once" in records(folder, "sanitizer")[0]["last"][0]
    script(checker, 'echo "========= Invalid __global__ write"; echo "========= ERROR SUMMARY: 2 errors"; exit 7')
    tools.memcheck(folder)
    script(checker, "echo 'Device not supported'; exit 1")
    tools.racecheck(folder)
    assert folder.failures == ["memcheck", "racecheck"]
    said = [r["error"] for r in records(folder, "failure")]
    assert "found 2 errors" in said[0]
    assert "Invalid __global__ write" in said[0]
    assert "status 1 and no summary" in said[1]
    table = '"ID","Kernel Name","gpu__time_duration.sum"\\n"","","us"\\n"0","forward_kernel","39.3"'
    script(tmp_path / "bin/ncu", f"case \"$*\" in *metrics*) exit 1;; esac; echo '==PROF=='; printf '{table}\\n'")
    tools.counters(folder)
    (counted,) = records(folder, "counters")
    assert (counted["kernel"], counted["values"]) == ("forward_kernel", {"gpu__time_duration.sum": "39.3 us"})


def test_tests_are_ordered_and_what_failed_is_kept(tmp_path: Path) -> None:
    """Masks and the step first, what compiles last; with pytest-xdist, too, where it is."""
    tests = {
        "test_a": "def test_compiles(): assert False, 'last words'\ndef test_other(): pass\n",
        "test_step_cuda": "def test_captured(): pass\ndef test_compiled(): pass\n",
        "test_broken": "import nothing_of_the_kind\n",
    }
    for name, text in tests.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_records"]
    command += ["--records", "out", "-v", "--continue-on-collection-errors", "-c", "pytest.ini"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    ran = [line.split("::")[1].split()[0] for line in done.stdout.splitlines() if "::" in line and "%]" in line]
    assert ran == ["test_captured", "test_other", "test_compiles", "test_compiled"], done.stdout + done.stderr
    found = records_of(tmp_path / "out")
    failed = [r for r in found if r["kind"] == "test"]
    assert [(r["test"], r["when"]) for r in failed] == [
        ("test_broken.py", "collect"),
        ("test_a.py::test_compiles", "call"),
    ]
    assert any("last words" in line for line in failed[1]["lines"])
    assert (found[-1]["passed"], found[-1]["failed"], found[-1]["how_far"]) == (3, 1, "all")


# What a machine with a GPU may lack, beside git and nvcc, and what no machine may need for a session's stages.
LACKING = ("omegaconf", "nbclient", "pdoc", "xdist", "tensorboard", "matplotlib", "hypothesis")


def test_stages_need_few_packages() -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({LACKING!r}))\n"
        "import importlib, os\n"
        "os.environ['PATH'] = ''\n"
        "from benchmarks.gpu.stages import FUNCTIONS\n"
        "import benchmarks.gpu.__main__, benchmarks.gpu.once\n"
        "for name in FUNCTIONS.values():\n"
        "    importlib.import_module('benchmarks.gpu.' + name.split('.')[0])\n"
        "from benchmarks.gpu import training\n"
        "training.run_whole(training.recipe(), 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
