"""Tests that the emulator runs hand-written PTX correctly and detects faults and races."""

import types

import pytest
import torch

from tools.ptx.decode import UnsupportedError

A, B, C = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
P, Q, R = torch.randint(-(2**31), 2**31, (3, 64), generator=torch.Generator().manual_seed(1)).to(
    torch.int32
)

_KERNEL = """
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 out,
	.param .u64 .ptr .global .align 1 a,
	.param .u64 .ptr .global .align 1 b,
	.param .u64 .ptr .global .align 1 c
)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<20>;
	.reg .b64 %rd<20>;
	ld.param.b64 %rd1, [out];
	ld.param.b64 %rd2, [a];
	ld.param.b64 %rd3, [b];
	ld.param.b64 %rd4, [c];
	mov.u32 %r1, %tid.x;
	shl.b32 %r6, %r1, 2;
	mul.wide.u32 %rd5, %r1, 4;
	add.s64 %rd1, %rd1, %rd5;
	add.s64 %rd2, %rd2, %rd5;
	add.s64 %rd3, %rd3, %rd5;
	add.s64 %rd4, %rd4, %rd5;
	ld.global.b32 %r2, [%rd2];
	ld.global.b32 %r3, [%rd3];
	ld.global.b32 %r4, [%rd4];
	BODY
	st.global.b32 [%rd1], %r5;
	ret;
}
"""


def run(machine, body, *inputs, programs=1, cooperative=False):
    """Runs `body` in 64 threads, with inputs in %r2, %r3 and %r4. Returns %r5 of each thread."""
    inputs = inputs or (A, B, C)
    out = torch.zeros_like(inputs[0])
    metadata = types.SimpleNamespace(launch_cooperative_grid=cooperative, num_warps=2, shared=1024)
    text = _KERNEL.replace("BODY", body)
    machine.launch(text, metadata, (programs, 1, 1), [out, *inputs])
    return out


def bits(low, high):
    """Packs pairs of 16-bit numbers into 32 bits."""
    low, high = (half.view(torch.int16).int() & 0xFFFF for half in (low, high))
    return low | high << 16


LANE = torch.arange(64)
FLOATS = {
    "add.f32 %r5, %r2, %r3": A + B,
    "sub.f32 %r5, %r2, %r3": A - B,
    "mul.f32 %r5, %r2, 0f40490FDB": A * torch.pi,
    "fma.rn.f32 %r5, %r2, %r3, %r4": (A.double() * B.double() + C.double()).float(),
    "div.full.f32 %r5, %r2, %r3": A / B,
    "neg.f32 %r5, %r2": -A,
    "abs.f32 %r5, %r2": A.abs(),
    "setp.lt.f32 %p1, %r2, %r3; selp.f32 %r5, %r2, %r4, %p1": torch.where(A < B, A, C),
    "shfl.sync.bfly.b32 %r5, %r2, 4, 31, -1": A[LANE ^ 4],
    "shfl.sync.idx.b32 %r5, %r2, 9, 31, -1": A[LANE // 32 * 32 + 9],
    "cvt.rn.bf16x2.f32 %r5, %r2, %r3": bits(B.bfloat16(), A.bfloat16()).view(torch.float32),
    "cvt.rn.f16x2.f32 %r5, %r2, %r3": bits(B.half(), A.half()).view(torch.float32),
    "cvt.rn.bf16.f32 %rs1, %r2; add.rn.f32.bf16 %r5, %rs1, %r3": A.bfloat16().float() + B,
    "mov.b32 {%rs1, %rs2}, %r2; cvt.f32.bf16 %r5, %rs2": (A.view(torch.int32) & -0x10000).view(
        torch.float32
    ),
}
INTEGERS = {
    "add.s32 %r5, %r2, %r3": P + Q,
    "mad.lo.s32 %r5, %r2, %r3, %r4": P * Q + R,
    "mul.hi.s32 %r5, %r2, %r3": (P.long() * Q.long() >> 32).int(),
    "min.s32 %r5, %r2, %r3": P.minimum(Q),
    "max.u32 %r5, %r2, %r3": (P ^ -(2**31)).maximum(Q ^ -(2**31)) ^ -(2**31),
    "shl.b32 %r5, %r2, 23": P << 23,
    "shr.s32 %r5, %r2, 5": P >> 5,
    "shr.u32 %r5, %r2, 40": torch.zeros_like(P),
    "bfe.u32 %r5, %r2, 5, 7": P >> 5 & 127,
    "bfe.s32 %r5, %r2, 3, 1": -(P >> 3 & 1),
    "and.b32 %r5, %r2, -2147483648": P & -(2**31),
    "cvt.s64.s32 %rd9, %r2; shr.s64 %rd9, %rd9, 40; cvt.u32.u64 %r5, %rd9": P >> 31,
    "redux.sync.max.s32 %r5, %r2, -1": P.view(2, 32).amax(1).repeat_interleave(32),
    "setp.lt.s32 %p1, %r2, 0; mov.pred %p2, -1; xor.pred %p1, %p1, %p2;"
    "mov.b32 %r5, 0; @!%p1 mov.b32 %r5, 7": torch.where(P < 0, 7, 0).int(),
    # The lanes of a warp branch differently, and reconverge at the shuffle.
    "setp.lt.s32 %p1, %r2, 0; @%p1 bra $L1; mov.b32 %r7, 1; bra $L2;\n$L1:\nmov.b32 %r7, 2;\n"
    "$L2:\nshfl.sync.bfly.b32 %r5, %r7, 1, 31, -1": torch.where(P < 0, 2, 1).int()[LANE ^ 1],
    "st.shared.b32 [%r6+16], %r2; bar.sync 0; xor.b32 %r7, %r6, 128;ld.shared.b32 %r5, [%r7+16]": P[
        LANE ^ 32
    ],
    "cp.async.ca.shared.global [%r6+0], [%rd2+0], 4; cp.async.commit_group;"
    "cp.async.wait_group 0; bar.sync 0; xor.b32 %r7, %r6, 128; ld.shared.b32 %r5, [%r7]": P[
        LANE ^ 32
    ],
}


@pytest.mark.parametrize("body", FLOATS)
def test_floating_point_instructions_agree_with_torch(machine, body):
    result = run(machine, body + ";", A, B, C)
    assert torch.equal(result.view(torch.int32), FLOATS[body].view(torch.int32))


@pytest.mark.parametrize("body", INTEGERS)
def test_integer_instructions_agree_with_torch(machine, body):
    assert torch.equal(run(machine, body + ";", P, Q, R), INTEGERS[body])


def test_conversions_to_16_bits_agree_with_torch(machine):
    """Conversions round ties to even. The numbers include subnormals, infinity and NaN."""
    numbers = torch.randint(-(2**31), 2**31, (40, 64), generator=torch.Generator().manual_seed(2))
    numbers = numbers.to(torch.int32).view(torch.float32)
    numbers[-8:] = torch.linspace(-1e-7, 1e-7, 512).view(8, 64)
    numbers[-16:-8] = torch.linspace(-70000, 70000, 512).view(8, 64)
    for row in numbers:
        for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
            body = f"cvt.rn.{name}.f32 %rs1, %r2; cvt.f32.{name} %r5, %rs1;"
            found, expected = run(machine, body, row, row, row), row.to(dtype).float()
            assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
            assert torch.equal(found.isnan(), expected.isnan())


FAULTS = {
    "ld.global.b32 %r5, [%rd4+4]": "out of bounds",
    "add.s64 %rd2, %rd2, 2; ld.global.b32 %r5, [%rd2]": "misaligned",
    "ld.shared.b32 %r5, [%r6+1020]": "shared memory: out of bounds",
    "ld.shared.b32 %r5, [%r6]": "shared memory: read before it was written",
    "st.shared.b32 [%r6], %r2; xor.b32 %r7, %r6, 128; ld.shared.b32 %r5, [%r7]": (
        "race between warps"
    ),
    "st.shared.b32 [%r6], %r2; xor.b32 %r7, %r6, 4; ld.shared.b32 %r5, [%r7]": (
        "race within a warp"
    ),
    "mov.b32 %r7, 0; st.shared.b32 [%r7], %r2; mov.b32 %r5, 0": "lanes store different values",
    "cp.async.ca.shared.global [%r6+0], [%rd2+0], 4; cp.async.commit_group;"
    "ld.shared.b32 %r5, [%r6]": "an asynchronous copy has not finished",
    "setp.lt.u32 %p1, %r1, 5; @%p1 bra $L1; bar.sync 0;\n$L1:\nmov.b32 %r5, 0": "divergence",
    "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0; mov.b32 %r5, 0": "barrier",
    "\n$L1:\nmov.b32 %r5, 0; bra $L1": "deadlock",
    "trap": "trap",
}


@pytest.mark.parametrize("body", FAULTS)
def test_the_emulator_detects_each_fault(machine, body):
    machine.options.patience = 10_000
    run(machine, body + ";")
    found = {fault.kind for fault in machine.faults}
    machine.faults.clear()
    assert any(FAULTS[body] in kind for kind in found), found


# Program 0 writes 64 numbers to %rd1, then increments a counter, the first element of c. Program 1
# waits for the counter and copies the numbers to a.
EXCHANGE = """
	ld.param.b64 %rd4, [c];
	mov.u32 %r7, %ctaid.x;
	setp.eq.s32 %p1, %r7, 0;
	setp.eq.s32 %p2, %r1, 0;
	@!%p1 bra $L1;
	st.global.b32 [%rd1], %r3;
	bar.sync 0;
	@%p2 red.global.gpu.release.add.u32 [%rd4], 1;
	bra.uni $L3;
$L1:
	@!%p2 bra $L2;
$L4:
	ld.global.gpu.acquire.b32 %r9, [%rd4];
	setp.eq.s32 %p3, %r9, 0;
	@%p3 bra $L4;
$L2:
	bar.sync 0;
	ld.global.b32 %r8, [%rd1];
	st.global.b32 [%rd2], %r8;
$L3:
	ret;
"""
MISSING = {
    "nothing": ("", ""),
    "the release": ("red.global.gpu.release", "red.global.gpu.relaxed"),
    "the acquire": ("ld.global.gpu.acquire", "ld.global.gpu.relaxed"),
    "the barrier before the release": ("bar.sync 0;\n\t@%p2 red", "@%p2 red"),
    "the barrier after the acquire": ("$L2:\n\tbar.sync 0;", "$L2:"),
}


@pytest.mark.parametrize("missing", MISSING)
def test_missing_synchronization_between_programs_is_reported_as_a_race(machine, missing):
    """There is a data race if the release, the acquire or one of the two barriers is missing.

    The race may make results wrong. With full synchronization, there is no race and no error.
    """
    wrong = found = 0
    for seed in range(20):
        machine.options.seed, machine.options.flush = seed, 0
        counter, numbers = torch.zeros(64, dtype=torch.int32), torch.zeros(64)
        body = EXCHANGE.replace(*MISSING[missing])
        run(machine, body, numbers, B, counter, programs=2, cooperative=True)
        wrong += not torch.equal(numbers, B)
        found += any("race between programs" in fault.kind for fault in machine.faults)
        machine.faults.clear()
    if missing == "nothing":
        assert (wrong, found) == (0, 0)
    else:
        assert found > 0
        assert wrong > 0 or missing == "the acquire"


def test_unknown_instructions_raise_an_error(machine):
    with pytest.raises(UnsupportedError, match=r"sin\.approx\.f32"):
        run(machine, "sin.approx.f32 %r5, %r2;")
    with pytest.raises(UnsupportedError, match="b128"):
        run(machine, "ld.global.b128 %r5, [%rd2];")
