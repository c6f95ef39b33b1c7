"""The kernels as compiled for the H100: no spills, wide accesses, loads in flight, the CPU's arithmetic; and planted
faults are seen."""

import re

import compile_report
import pytest

MISSING = compile_report.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]

PLANTED = """
#include "common/gpu.h"
namespace ssd_ext::boxes {
namespace {

// Four values of a row one by one.
template <class T>
__global__ void __launch_bounds__(256) encode_kernel(const T* __restrict__ in, T* __restrict__ out) {
  const int64_t i = 4 * gpu::global_index();
  for (int k = 0; k < 4; ++k) out[i + k] = T(2.f) * in[i + k];
}
template __global__ void encode_kernel<double>(const double*, double*);
template __global__ void encode_kernel<float>(const float*, float*);
template __global__ void encode_kernel<__half>(const __half*, __half*);

// The same as it should be.
template <class T>
__global__ void __launch_bounds__(256) decode_kernel(const T* __restrict__ in, T* __restrict__ out) {
  const auto b = gpu::load_box(in, gpu::global_index());
  gpu::store_four(out, gpu::global_index(), b.y2, b.x1, b.y1, b.x2);
}
template __global__ void decode_kernel<double>(const double*, double*);
template __global__ void decode_kernel<float>(const float*, float*);
template __global__ void decode_kernel<__half>(const __half*, __half*);

// 64 values to hold, 32 registers.
__global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[63 - i];
}

__global__ void __launch_bounds__(256) indexes_an_array(const int* digits, int* most, int n) {
  int counts[16] = {};
  for (int i = 0; i < n; ++i) ++counts[digits[i * 256 + threadIdx.x] & 15];
  for (int i = 0; i < 16; ++i) most[threadIdx.x] = max(most[threadIdx.x], counts[i]);
}

__global__ void __launch_bounds__(256) spins(unsigned long long* x) {
  __shared__ unsigned long long most;
  if (threadIdx.x == 0) most = 0;
  __syncthreads();
  atomicMax(&most, x[threadIdx.x]);
  __syncthreads();
  x[threadIdx.x] = most;
}

enum class Order { up, down };
template <Order order, int n>
__global__ void unbounded(int* x) {
  extern __shared__ int shared[];
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = shared[order == Order::up ? threadIdx.x / n : n - threadIdx.x];
}
template __global__ void unbounded<Order::down, 4>(int*);

// Unrolled, it loads four before it adds the first.
template <int each>
__global__ void __launch_bounds__(256) sums(const float* __restrict__ x, float* __restrict__ out, int n) {
  float sum = 0;
#pragma unroll(each)
  for (int i = threadIdx.x; i < n; i += 256) sum += x[i];
  out[threadIdx.x] = sum;
}
template __global__ void sums<1>(const float*, float*, int);
template __global__ void sums<4>(const float*, float*, int);

// Unrolled, but each load waits for the one before.
__global__ void __launch_bounds__(256) follows(const int* __restrict__ next, int* __restrict__ x, int n) {
  int i = threadIdx.x;
#pragma unroll 4
  for (int k = 0; k < n; ++k) i = next[i];
  x[threadIdx.x] = i;
}

template <class V>
__global__ void __launch_bounds__(256) clears(V* __restrict__ x) {
  x[gpu::global_index()] = V{};
}
template __global__ void clears<float>(float*);
template __global__ void clears<float4>(float4*);

__device__ float approximation(float x) { return __expf(__logf(x)); }
__global__ void __launch_bounds__(256) approximates(float* x) { x[threadIdx.x] = approximation(x[threadIdx.x]); }
__global__ void __launch_bounds__(256) rough_kernel(float* x) { x[threadIdx.x] = approximation(x[threadIdx.x]); }

// As exact as the CPU, in spite of the instructions that it takes.
__global__ void __launch_bounds__(256) divides(float* x, double* y, unsigned* n, unsigned long long* m) {
  const int i = threadIdx.x;
  x[i] = sqrtf(x[i]) + x[i + 256] / x[i + 512] + 1 / x[i + 768];
  y[i] = sqrt(y[i]) + y[i + 256] / y[i + 512] + 1 / y[i + 768];
  n[i] = n[i] / n[i + 256] + n[i + 512] % n[i + 768];
  m[i] = m[i] / m[i + 256] + m[i + 512] % m[i + 768];
}
__global__ void __launch_bounds__(256) converts(float* x, unsigned* n) { n[threadIdx.x] = unsigned(x[threadIdx.x]); }

}  // namespace
}  // namespace ssd_ext::boxes
"""

FAULTS = {  # of each planted kernel: patterns
    **{
        f"encode_kernel<{name}>": [
            f"has no LDG of {wide} bytes",
            f"has no STG of {wide} bytes",
            f"moves four neighbours of {size} bytes one by one: LDG",
            f"moves four neighbours of {size} bytes one by one: STG",
        ]
        for name, size, wide in (("double", 8, 16), ("float", 4, 16), ("half", 2, 8))
    },
    "decode_kernel<double>": [],
    "decode_kernel<float>": [],
    "decode_kernel<half>": [],
    "spills": [r"spills \d+ bytes of registers", r"keeps \d+ bytes a thread in local memory"],
    "indexes_an_array": ["keeps 64 bytes a thread in local memory"],
    "spins": [r"spins over an atomic in shared memory: ATOMS\.\S*SPIN\.64"],
    "unbounded<1, 4>": ["has no __launch_bounds__"],
    "sums<1>": [r"streams with 1 of 4 loads in flight: sum \+= .*", "has no LDG in a line with: no such line"],
    "sums<4>": [],
    "follows": ["streams with 1 of 4 loads in flight: i = next.*"],
    "clears<float>": ["streams with stores of 4 bytes a lane: x.*"],
    "clears<float4>": [],
    "approximates": [f"does not compute what the CPU computes: MUFU.{name}" for name in ("EX2", "LG2")],
    "rough_kernel": [],
    "divides": [],
    "converts": [],
}
STREAMING = [
    ("boxes::sums", "LDG", "T", "sum += x[i]"),
    ("boxes::sums<1>", "LDG", "T", "no such line"),
    ("boxes::follows", "LDG", "T", "i = next[i]"),
    ("boxes::clears", "STG", "T", "x[gpu::global_index()] = V{}"),
]
FLUSHED = {  # under -ftz=true
    "sums<4>": {"FADD.FTZ"},
    "divides": {
        "FADD.FTZ",
        "__cuda_sm3x_div_rn_ftz_f32_slowpath",
        "__cuda_sm20_rcp_rn_ftz_f32_slowpath",
        "__cuda_sm20_sqrt_rn_ftz_f32_slowpath",
    },
    "converts": {"F2I.FTZ.U32.TRUNC.NTZ"},
    "follows": set(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compile_report")


@pytest.fixture(scope="module")
def commands(folder):
    """With flags from the environment that those of CMakeLists.txt must win over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDAFLAGS", "-use_fast_math -ftz=true -fmad=true")
        return compile_report.compile_commands(folder)


def test_kernels_have_no_fault(commands, folder):
    kernels = compile_report.compile_all(commands, folder)
    print(compile_report.table(kernels))
    assert [f"{k.name} {fault}" for k in kernels for fault in compile_report.faults(k)] == []
    claimed = set(compile_report.WIDE) | set(compile_report.DYNAMIC_SHARED)
    assert claimed <= {k.template for k in kernels}, "a claim about no kernel"
    for name, *_ in compile_report.STREAMING:
        assert any(re.match(name, k.name) for k in kernels), "a claim about no kernel"


def compile_planted(command, folder, *more_flags):
    source = folder / "planted.cu"
    source.write_text(PLANTED)
    kernels = compile_report.compile_kernels(source, command, folder, *more_flags)
    return {k.name.removeprefix("boxes::"): k for k in kernels}


def test_planted_faults_are_seen(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_report, "STREAMING", STREAMING)
    by_name = compile_planted(next(iter(commands.values())), tmp_path)
    assert by_name.keys() == FAULTS.keys()
    for name, patterns in FAULTS.items():
        found = list(compile_report.faults(by_name[name]))
        assert len(found) == len(patterns) and all(map(re.fullmatch, patterns, found)), (name, found)
    assert by_name["unbounded<1, 4>"].dynamic_shared is None  # nobody told how much
    assert by_name["spins"].dynamic_shared == 0


def test_flags_that_change_arithmetic(commands, tmp_path):
    command = next(iter(commands.values()))
    assert compile_report.inexact_flags(command) == []
    for flag in compile_report.EXACT:
        assert compile_report.inexact_flags([f for f in command if f != flag]) == [flag]
    flushing = {source: [*command, "-ftz=true"] for source, command in commands.items()}
    with pytest.raises(ValueError, match="without -ftz=false"):
        compile_report.compile_all(flushing, tmp_path)
    by_name = compile_planted(command, tmp_path, "-ftz=true")
    for name, found in FLUSHED.items():
        assert compile_report.inexact(by_name[name].code) == found, name


@pytest.mark.parametrize(
    ("spills", "passes"),
    [
        ({"sm_75": 0, "sm_90": 0}, True),
        ({"sm_75": 4, "sm_90": 0}, True),
        ({"sm_75": 0, "sm_90": 4}, False),
        ({"sm_75": 0}, False),
    ],
)
def test_log_of_a_build(tmp_path, capsys, spills, passes):
    log = tmp_path / "build.log"
    log.write_text(
        "".join(
            f"ptxas info    : Compiling entry function '_ZN7ssd_ext5boxes1fIfEEvPT_' for '{architecture}'\n"
            "ptxas info    : Function properties for _ZN7ssd_ext5boxes1fIfEEvPT_\n"
            f"    0 bytes stack frame, {size} bytes spill stores, {size} bytes spill loads\n"
            "ptxas info    : Used 20 registers, used 0 barriers\n"
            for architecture, size in spills.items()
        )
    )
    assert compile_report.check_log(log) == passes
    told = capsys.readouterr().out.splitlines()
    assert told[:-1] == [f"boxes::f<float> spills {2 * size} bytes on {name}" for name, size in spills.items() if size]


def test_blocks_at_a_time(tmp_path):
    blocks = {(32, 0): 8, (64, 0): 4, (65, 0): 3, (32, 40 << 10): 5, (32, 48 << 10): 4, (32, (48 << 10) + 1): 0}
    kernels = [
        compile_report.Kernel("k", "k", "sm_90", registers, barriers=1, shared=shared, stack=0, spills=0, threads=256)
        for registers, shared in blocks
    ]
    compile_report.count_blocks(kernels, tmp_path)
    assert [k.blocks for k in kernels] == list(blocks.values())
    assert [list(compile_report.faults(k)) for k in kernels] == 5 * [[]] + [["does not fit a multiprocessor"]]
