import pytest
import sass

# As `nvdisasm -gi` prints it. Lines 2, 3 and 4 of the source are a loop each.
LISTING = """
	.section	.text._Z6kernelPf,"ax",@progbits
.text._Z6kernelPf:
        .type           _Z6kernelPf,@function
_Z6kernelPf:
	//## File "{source}", line 1
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 EXIT ;
.L_x_1:
	//## File "{source}", line 5 inlined at "{source}", line 2
	//## File "{source}", line 2
        /*0020*/                   LDG.E.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 LDG.E.CONSTANT R5, desc[UR4][R2.64+0x4] ;
        /*0040*/                   LDG.E.64 R6, desc[UR4][R8.64+-0x10] ;
	//## File "{source}", line 1
        /*0050*/                   FADD R9, R7, R9 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
	//## File "{source}", line 3
        /*0070*/                   LDG.E.128 R12, desc[UR4][R2.64] ;
        /*0080*/               @P1 BRA `(.L_x_3) ;
        /*0090*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
.L_x_3:
        /*00a0*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*00b0*/                   LDG.E R6, desc[UR4][R4.64] ;
        /*00c0*/                   STG.E.U8 desc[UR4][R2.64+0x8], R15 ;
        /*00d0*/               @P3 BRA `(.L_x_2) ;
.L_x_4:
	//## File "{source}", line 4
        /*00e0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00f0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath) ;
        /*0100*/               @P3 BRA `(.L_x_5) ;
.L_x_5:
        /*0110*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0120*/               @P4 BRA `(.L_x_5) ;
        /*0130*/               @P3 BRA `(.L_x_4) ;
        /*0140*/                   EXIT ;
        .weak           $__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath
$__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*0150*/                   FADD.FTZ R0, R0, R1 ;
.L_x_6:
        /*0160*/                   BRA `(.L_x_6);
        /*0170*/                   NOP;
"""


@pytest.fixture
def code(tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text("the kernel\nfirst loop\nsecond loop\nthird loop\nan inlined function\n")
    return sass.read(LISTING.replace("{source}", str(source)))


def test_instructions(code):
    assert [i.name for i in code.instructions[:3]] == ["S2R", "EXIT", "LDG"]
    assert not any("FTZ" in i.opcode for i in code.instructions)  # in a subroutine of CUDA
    assert [i.bytes for i in code.named("LDG")] == [4, 4, 8, 16, 2, 4, 4, 4]
    assert [i.address for i in code.named("LDG", "STG")[:3]] == [("R2.64", 0), ("R2.64", 4), ("R8.64", -16)]
    (store,) = code.named("STG")
    assert (store.bytes, store.address, store.registers) == (1, ("R2.64", 8), {2, 3, 15})
    for text in ("an inlined function", "first loop"):
        assert [n for n, i in enumerate(code.instructions) if i.is_from(text)] == [2, 3, 4]


def test_loads_in_flight(code):
    assert code.loops() == {(2, 6), (7, 13), (14, 19), (17, 18)}
    # Ended by a use of R7, a branch, a branch's target, a use of R5 in R4.64, a branch, a call.
    assert list(code.runs()) == [[2, 3, 4], [7], [9], [10], [11], [14]]
    assert sorted(map(len, code.in_flight())) == [1, 3]
    assert sass.Code(code.instructions[2:5]).in_flight() == [[0, 1, 2]]  # no loop
    assert sass.Code().in_flight() == [[]]


def test_streamed(code):
    assert code.streamed("first loop", 4) == (3, "1.2")  # five instructions, 16 bytes
    assert code.streamed("first loop", 2) == (3, "0.6")
    assert code.streamed("second loop", 2) == (1, "<= 0.5")  # seven, 26 bytes, and a branch
    assert code.streamed("third loop", 4) == (1, "<= 4.0 + loops")  # four instructions around a loop of two
    assert code.streamed("the kernel", 4) == (0, "")
    assert sass.Code(code.instructions[1:5]).streamed("first loop", 4) == (3, "1.0")  # no loop
