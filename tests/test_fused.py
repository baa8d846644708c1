"""fused.py against the naive form in float64, and the promises about memory and skipped rows."""
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from reference import LargestTensor, naive_policy_loss

import fused
from fused import policy_loss
from policy_reinforce import reinforce_loss
from policy_wmle import weighted_mle_loss

N, V, D = 7, 13, 5


def problem(n=N, v=V, d=D, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return (draw(n, d).requires_grad_(), draw(v, d).requires_grad_(), torch.randint(v, (n,), generator=g),
            draw(n).abs(), draw(n).abs())


def assert_same(got, expected, leaves, **tolerance):
    torch.testing.assert_close(got, expected, **tolerance)
    gradients = torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("n, chunk", [(7, None), (7, 1), (7, 3), (7, 7), (7, 100), (1, None), (1, 1)])
def test_loss_and_gradients_equal_the_naive_form(n, chunk, entropy):
    hidden, weight, targets, a, b = problem(n)
    b = b if entropy else None
    loss = policy_loss(hidden, weight, targets, a, b, chunk)[0]
    expected = naive_policy_loss(hidden, weight, targets, a, b)[0]
    assert_same(loss, expected, (hidden, weight), rtol=0, atol=1e-12)


def plain_form(**given):
    """The names that the code in the header of fused.py leaves behind, from `given`; E9's line only where
    there is a `w`."""
    text = fused.__doc__.split("to these lines:")[1].split("Since a and b")[0]
    lines = [x.strip() for x in text.splitlines() if x.strip()]
    assert len(lines) == 7
    exec("\n".join(x for x in lines if "w" in given or not x.startswith("a, b")), {}, given)
    return given


@pytest.mark.parametrize("objective", ["E7, E8", "E9"])
def test_the_plain_form_in_the_header_is_what_the_objectives_compute(objective):
    hidden, weight, targets, rewards, _ = problem(12)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    r, alpha = rewards.view(3, 4), 0.3
    given = dict(hidden=hidden, weight=weight, targets=targets, mask=mask.flatten().double(), r=rewards,
                 alpha=alpha)
    rows = hidden.view(3, 4, D), weight, targets.view(3, 4), mask, r
    if objective == "E9":
        w = r / (r * mask).sum(1, keepdim=True)  # divisor: the reward sum of its own sequence
        given |= {"w": w.flatten(), "sequences": 3}
        loss, _ = weighted_mle_loss(*rows)
    else:
        loss, _ = reinforce_loss(*rows, alpha=alpha)
    assert_same(loss, plain_form(**given)["loss"], (hidden, weight), rtol=0, atol=1e-12)
    plain = plain_form(**given)
    loss, logp, entropy = policy_loss(hidden, weight, targets, plain["a"], plain["b"].detach(), chunk=5)
    assert_same(loss, plain["loss"], (hidden, weight), rtol=0, atol=1e-12)
    kept = given["mask"] > 0  # policy_loss skips rows without a weight
    torch.testing.assert_close(logp[kept], plain["logp"][kept], rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy[kept], plain["entropy"][kept], rtol=0, atol=1e-12)


def test_weights_of_either_sign():
    hidden, weight, targets, a, b = problem()
    signs = torch.tensor([1.0, -1, 1, -1, 0, 0, 1])
    expected = naive_policy_loss(hidden, weight, targets, a * signs, -b)[0]
    assert_same(policy_loss(hidden, weight, targets, a * signs, -b, 2)[0], expected, (hidden, weight),
                rtol=0, atol=1e-12)


def test_log_probabilities_and_entropies_are_those_of_the_softmax():
    hidden, weight, targets, a, b = problem()
    _, logp, entropy = policy_loss(hidden, weight, targets, a, b, 3)
    _, expected_logp, expected_entropy = naive_policy_loss(hidden, weight, targets, a, b)
    torch.testing.assert_close(logp, expected_logp.detach())
    torch.testing.assert_close(entropy, expected_entropy.detach())
    assert not logp.requires_grad and not entropy.requires_grad
    assert (logp <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(V) + 1e-12).all()


def test_entropy_is_none_without_its_weights():
    hidden, weight, targets, a, _ = problem()
    assert policy_loss(hidden, weight, targets, a)[2] is None


def test_a_row_by_hand():
    # logits (ln 3, 0): p = 3/4, 1/4; target the second; H = ln 4 - 3/4 ln 3
    head = torch.tensor([[math.log(3)], [0.0]])
    loss, logp, entropy = policy_loss(torch.ones(1, 1), head, torch.tensor([1]),
                                      torch.tensor([2.0]), torch.tensor([0.5]))
    h = math.log(4) - 0.75 * math.log(3)
    expected = (2 * math.log(4) - 0.5 * h, -math.log(4), h)
    assert (loss.item(), logp.item(), entropy.item()) == pytest.approx(expected, rel=1e-6)


def test_rows_without_weight_are_never_read():
    hidden, weight, targets, a, b = problem()
    off = torch.tensor([0, 3, 4])
    poisoned = hidden.detach().clone().index_fill(0, off, float("nan")).requires_grad_()
    a, b = a.index_fill(0, off, 0.0), b.index_fill(0, off, 0.0)
    loss, logp, entropy = policy_loss(poisoned, weight, targets, a, b, 2)
    got = torch.autograd.grad(loss, (poisoned, weight))
    expected = naive_policy_loss(hidden, weight, targets, a, b)[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, (hidden, weight)))
    assert logp[off].eq(0).all() and entropy[off].eq(0).all() and got[0][off].eq(0).all()


def test_a_row_with_entropy_alone_is_read():
    hidden, weight, targets, a, b = problem()
    a = a.index_fill(0, torch.tensor([2]), 0.0)
    _, logp, entropy = policy_loss(hidden, weight, targets, a, b)
    assert logp[2] < 0 and entropy[2] > 0


@pytest.mark.parametrize("n", [0, 4])
def test_no_row_with_weight_is_zero(n):
    hidden, weight, targets, a, b = problem(n)
    loss, _, _ = policy_loss(hidden, weight, targets, 0 * a, 0 * b)
    loss.backward()
    assert loss == 0 and hidden.grad.eq(0).all() and weight.grad.eq(0).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_side_gets_no_gradient_and_the_other_the_right_one(frozen):
    leaves = list(problem()[:2])
    targets, a, b = problem()[2:]
    expected = torch.autograd.grad(naive_policy_loss(*leaves, targets, a, b)[0], leaves)
    leaves[frozen] = leaves[frozen].detach()
    policy_loss(*leaves, targets, a, b)[0].backward()
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, expected[1 - frozen])


def test_without_gradients_the_figures_are_the_same():
    hidden, weight, targets, a, b = problem()
    with torch.no_grad():
        quiet = policy_loss(hidden, weight, targets, a, b)
    assert not quiet[0].requires_grad
    torch.testing.assert_close(quiet, tuple(x.detach() for x in policy_loss(hidden, weight, targets, a, b)))


def test_weights_are_constants():
    hidden, weight, targets, a, b = problem()
    a.requires_grad_(), b.requires_grad_()
    policy_loss(hidden, weight, targets, a, b)[0].backward()
    assert a.grad is None and b.grad is None


def test_second_backward_raises():
    hidden, weight, targets, a, b = problem()
    loss = policy_loss(hidden, weight, targets, a, b)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_gradient_of_the_gradient_raises():
    hidden, weight, targets, a, b = problem()
    grad, = torch.autograd.grad(policy_loss(hidden, weight, targets, a, b)[0], hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_factor_behind_the_loss_scales_the_gradient():
    hidden, weight, targets, a, b = problem()
    assert_same(-2.5 * policy_loss(hidden, weight, targets, a, b)[0],
                -2.5 * naive_policy_loss(hidden, weight, targets, a, b)[0], (hidden, weight))


def test_two_losses_of_one_head_add_up():
    hidden, weight, targets, a, b = problem()
    both = sum(policy_loss(hidden[s], weight, targets[s], a[s], b[s])[0] for s in (slice(0, 4), slice(4, 7)))
    assert_same(both, policy_loss(hidden, weight, targets, a, b)[0], (hidden, weight))


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_is_near_float64(dtype, near):
    hidden, weight, targets, a, b = problem(64, 50, 16)
    low = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    loss = policy_loss(*low, targets, a, b, chunk=10)[0]
    assert loss.dtype == torch.float32  # statistics stay in float32
    exact = [x.detach().double().requires_grad_() for x in low]
    expected = naive_policy_loss(*exact, targets, a, b)[0]
    for x, y in zip(torch.autograd.grad(loss, low), torch.autograd.grad(expected, exact)):
        assert x.dtype == dtype and (x - y).norm() < near * y.norm()
    assert abs(loss - expected) < near * abs(expected)


def test_autocast_is_near_float32():
    hidden, weight, targets, a, b = problem(dtype=torch.float32)
    expected = torch.autograd.grad(naive_policy_loss(hidden, weight, targets, a, b)[0], (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = policy_loss(hidden, weight, targets, a, b)[0]
    for x, y in zip(torch.autograd.grad(loss, (hidden, weight)), expected):
        assert x.dtype == torch.float32 and (x - y).norm() < 0.03 * y.norm()


def test_all_logits_never_exist_at_once():
    n, v, chunk = 64, 300, 8
    hidden, weight, targets, a, b = problem(n, v, 4)
    with LargestTensor() as naive:
        naive_policy_loss(hidden, weight, targets, a, b)[0].backward()
    with LargestTensor() as fused:
        policy_loss(hidden, weight, targets, a, b, chunk)[0].backward()
    assert naive.numbers >= n * v and fused.numbers <= chunk * v


@pytest.mark.filterwarnings("error")
def test_the_room_for_logits_has_their_shape():
    """Else a library makes other room behind our back, with a warning and none of the saving."""
    hidden, weight, targets, a, b = problem()
    policy_loss(hidden, weight, targets, a, b, chunk=5)[0].backward()


@pytest.mark.parametrize("spoil", ["hidden", "weight", "targets", "logp_weight", "entropy_weight"])
def test_shapes_must_fit(spoil):
    names = ("hidden", "weight", "targets", "logp_weight", "entropy_weight")
    given = dict(zip(names, problem()))
    given[spoil] = given[spoil].detach()[..., :-1] if spoil in ("hidden", "weight") else given[spoil][:, None]
    with pytest.raises(ValueError, match=spoil):
        policy_loss(**given)


# ----------------------------------------------------------------------------------------------- other bodies

def needs_triton():
    """Skips where no triton is, or one whose interpreter, the stand-in for a GPU (conftest.py), cannot run
    the kernel."""
    triton = pytest.importorskip("triton")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 5) and os.environ.get("TRITON_INTERPRET") == "1":  # int() of an array; 3.7 has none
        pytest.skip("the interpreter of triton up to 3.4 does not work with numpy 2.4")


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("body", ["compiled", "triton"])
def test_every_body_equals_the_eager_one(body, entropy, monkeypatch):
    if body == "triton":
        needs_triton()
    elif not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    if body == "compiled":
        try:
            torch.compile(torch.relu)
        except UnicodeDecodeError:  # torch 2.13 reads a template of its own in the locale's encoding
            pytest.skip("torch.compile of this torch needs a locale beyond ASCII")
    hidden, weight, targets = torch.randn(12, 16), torch.randn(301, 16), torch.randint(301, (12,))
    a, b = torch.randn(12), torch.rand(12) if entropy else None
    a[3] = 0
    results = []
    for name in ("eager", body):
        monkeypatch.setattr(fused, "BODY", name)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, logp, ent = policy_loss(h, w, targets, a, b, chunk=6)  # two chunks of one shape: compiled once
        loss.backward()
        results.append([loss.detach(), logp, h.grad, w.grad] + ([ent] if entropy else []))
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_kernel_by_itself_zeroes_a_masked_row():
    needs_triton()
    z, y = torch.randn(3, 70), torch.tensor([1, 2, 3])
    a, b = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 0.0, 0.2])
    grad, logp, _ = fused._triton_chunk(z.clone(), None, y, a, b,
                                        block=32)
    assert (grad[1] == 0).all() and logp[1] == 0
    torch.testing.assert_close(logp[[0, 2]], z.log_softmax(-1)[[0, 2], y[[0, 2]]])
    torch.testing.assert_close(grad[0], z[0].softmax(-1) - torch.eye(70)[1], rtol=1e-4, atol=1e-6)


COMPILE = """
import fused
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
kind = {"a_ptr": "*fp32", "b_ptr": "*fp32", "logp_ptr": "*fp32", "entropy_ptr": "*fp32", "y_ptr": "*i64",
        "V": "i32",
        "stride": "i32"}
for z, with_b in (("*bf16", True), ("*fp32", False)):
    fixed = {"HAS_B": with_b, "BLOCK": 4096}
    names = fused._row_kernel.arg_names
    signature = {name: "constexpr" if name in fixed else kind.get(name, z) for name in names}
    made = compile(ASTSource(fused._row_kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
    print(len(made.asm["cubin"]) > 0)
"""


def test_the_kernel_compiles_for_a_gpu_without_one(tmp_path):
    """To the machine code of an H100 or H200: the interpreter would not notice what the compiler refuses."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
                          cwd=os.path.dirname(fused.__file__))
    assert done.stdout.split() == ["True", "True"], done.stderr
