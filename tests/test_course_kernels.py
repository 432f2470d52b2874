"""Triton in the course: bugs planted in real kernels are named, and without Triton the check says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dsv2.course import chapters, stubs
from dsv2.course.folders import HERE, ROOT
from dsv2.course.judge import judge
from dsv2.course.kernels import held
from dsv2.course.worker import run_file
from dsv2.kernels.backend import triton

CHAPTER = chapters.find()["05"]
EXERCISES = {exercise.number: exercise for exercise in chapters.load(CHAPTER)}

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")

RESCALED = "mixture * shrink[:, None] + tl.dot"
MASKED = 'tl.where(filled, scores * scale_log2, -float("inf"))'
MASKED_LOAD = "mask=filled[:, None], other=0.0"
PLANTED = [
    ("05.2", RESCALED, "mixture + tl.dot", "mixture not rescaled"),
    ("05.2", "total * shrink +", "total +", "sum not rescaled"),
    ("05.2", "tl.exp2(largest - larger)", "tl.exp2(larger - largest)", "rescaled by the wrong sign"),
    ("05.2", "slot < tokens", "slot <= tokens", "one token too many"),
    ("05.2", "slot < tokens", "slot < tokens - 1", "the newest token missed"),
    ("05.2", "start + slot < tokens", "slot < PAGE", "the whole last page"),
    ("05.2", "range(0, tokens, PAGE)", "range(0, tokens // PAGE * PAGE, PAGE)", "last page left out"),
    ("05.2", MASKED, "scores * scale_log2", "zeros with a score"),
    ("05.2", ", mask=filled[:, None], other=0.0", "", "NaN times a weight of 0"),
    ("05.2", "tl.load(table + start // PAGE)", "(start // PAGE)", "pages in the pool's order"),
    ("05.2", "tl.exp2", "tl.exp", "e and 2 mixed up"),
    ("05.2", "scale * LOG2_E", "scale", "powers of 2 of plain scores"),
    ("05.2", "scale * LOG2_E", "scale * scale * LOG2_E", "scale used twice"),
    ("05.2", "mixture / total[:, None]", "mixture", "not divided"),
    ("05.2", "* PAGE + slot", "+ slot", "page number taken for a row"),
    ("05.2", MASKED_LOAD, MASKED_LOAD.replace("0.0", '-float("inf")'), "slots loaded as -inf"),
    ("05.2", "start + slot <", "tl.load(table + start // PAGE) * PAGE + slot <", "mask of the pool's rows"),
    ("05.2", "largest = larger", "larger = larger", "maximum not carried on"),
    (
        "05.2",
        "largest = larger",
        "largest, mixture = larger, mixture / total[:, None]",
        "divided on every page",
    ),
    ("05.5", MASKED, "scores * scale_log2", "zeros with a score"),
    (
        "05.5",
        "tl.cdiv(tiles, tl.num_programs(0))",
        "tiles // tl.num_programs(0)",
        "remainder of the tiles lost",
    ),
    ("05.5", "tl.minimum((part + 1) * each, tiles)", "tiles", "every part reads on to the end"),
    ("05.5", RESCALED, "mixture + tl.dot", "mixture not rescaled"),
    ("05.5", "largest + tl.log2(divisor)", "largest + tl.log(divisor)", "logarithm to base e"),
    ("05.5", "mixture / divisor[:, None]", "mixture", "not divided"),
    ("05.5", "tl.where(total == 0, 1.0, total)", "total", "NaN for an empty part"),
]


@needs_triton
@pytest.mark.parametrize(
    "number, right, wrong, name", PLANTED, ids=[f"{number} {name}" for number, *_, name in PLANTED]
)
def test_a_bug_in_a_kernel_is_named(tmp_path, number, right, wrong, name):
    """The mistakes are written in PyTorch; here they are made in the kernel."""
    text = stubs.read(HERE.solution(CHAPTER))
    kernel = stubs.solved(text, number)
    assert right in kernel
    file = tmp_path / "planted.py"
    file.write_text(stubs.parts(text)[stubs.TOP] + "\n\n\n" + kernel.replace(right, wrong), encoding="utf-8")
    exercise = EXERCISES[number]
    verdict = judge(exercise, run_file(file)[exercise.name], str(file))
    assert (verdict.status, verdict.mistake) == ("failed", name), verdict


@needs_triton
def test_an_exception_in_a_kernel_is_shown_with_its_line(tmp_path):
    text = stubs.read(HERE.solution(CHAPTER))
    file = tmp_path / "raising.py"
    kernel = stubs.solved(text, "05.2").replace("filled = start + slot", "filled = begin + slot")
    file.write_text(stubs.parts(text)[stubs.TOP] + "\n\n\n" + kernel, encoding="utf-8")
    exercise = EXERCISES["05.2"]
    verdict = judge(exercise, run_file(file)[exercise.name], str(file))
    assert verdict.status == "raised" and "begin" in str(verdict.found)
    if not torch.cuda.is_available():
        assert "begin + slot" in verdict.code


@needs_triton
def test_held_reports_and_refuses(capsys):
    held(torch.sin, lambda x: x.sin() + 1e-7, torch.ones(2, 3))
    assert "2 x 3 numbers, up to 0.84 large" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="differ by 0.1"):
        held(torch.sin, lambda x: x.sin() + 0.1, torch.ones(4))
    with pytest.raises(AssertionError, match="differ by nan"):
        held(lambda x: x * float("nan"), torch.sin, torch.ones(4))
    with pytest.raises(AssertionError, match=r"\(4,\)"):
        held(torch.sin, lambda x: x.sin()[:2], torch.ones(4))


WITHOUT = """
import torch
from dsv2.course import chapters, page
from dsv2.course.judge import judge
from dsv2.course.kernels import COMPILED, NoTriton, held, tl, triton

@triton.jit
def kernel(x, y, N: tl.constexpr):
    tl.store(y, tl.load(x))

def launch(x):
    kernel[(triton.cdiv(4, 2),)](x, x, N=2)

held(launch, torch.neg, torch.ones(5))
try:
    launch(torch.ones(1))
except NoTriton as error:
    print("NoTriton:", error)
for exercise in chapters.resolve(["05"]):
    print(exercise.number, judge(exercise, exercise.answer).status)
page.check("05.2")
"""


def test_without_triton_kernels_are_read_and_the_check_says_why(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('none here')\n", encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    ended = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    assert "PyTorch gives 5 numbers" in said and "NoTriton: Triton is not installed" in said
    states = [f"05.{number} {'not here' if number in (2, 5) else 'passed'}" for number in range(1, 7)]
    assert all(state in said for state in states), said
    assert "cannot be checked here" in said
