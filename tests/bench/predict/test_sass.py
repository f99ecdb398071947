"""Instructions, their control bits and source lines, as nvdisasm prints them."""

from __future__ import annotations

import pytest

from predict.sass import NOT_SET, decode, parse

TEXT = """
\t.section\t.text.some_kernel,"ax",@progbits
.text.some_kernel:
\t//## File "/folder/file.py", line 7
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000e620000000800 */
.L_x_0:
\t//## File "/folder/other.py", line 9
        /*0010*/              @!P2 LDG.E.128 R4, desc[UR4][R2.64] ;       /* 0x0000000402047981 */
                                                                          /* 0x004ea2000c1e1d00 */
        /*0020*/               @P0 BRA `(.L_x_0) ;                        /* 0xfffffffc00f00947 */
                                                                          /* 0x000fea000383ffff */
"""


def test_instructions_have_their_lines_and_labels():
    function = parse(TEXT)["some_kernel"]
    load_constant, load, branch = function.instructions
    assert (load_constant.file, load_constant.line) == ("/folder/file.py", 7)
    assert (load.file, load.line, load.guard, load.opcode, load.width) == (
        "/folder/other.py",
        9,
        "!P2",
        "LDG.E.128",
        16,
    )
    assert branch.target == ".L_x_0" and function.labels == {".L_x_0": 0x10}


# (upper half of an encoding, stall, yields, write, read, wait), each field by hand from bits 105 to 125:
# wait 6 bits, read 3, write 3, yield 1 (0 yields), stall 4
CONTROL = {
    "a load that clears scoreboard 1 and waits for none": (0x000E620000000800, 1, False, 1, NOT_SET, 0),
    "it waits for scoreboard 0": (0x001FCA0000000000, 5, True, NOT_SET, NOT_SET, 0b000001),
    "its operands clear scoreboard 2": (0x0005E20000000000, 1, False, NOT_SET, 2, 0),
    "all that can be set": (0b111111_101_100_0_1111 << 41, 15, True, 4, 5, 0b111111),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_bits(name: str):
    upper, stall, yields, write, read, wait = CONTROL[name]
    found = decode(0, "NOP", upper)
    assert (found.stall, found.yields, found.write, found.read, found.wait) == (stall, yields, write, read, wait)


def test_an_instruction_without_its_second_half_is_refused():
    with pytest.raises(ValueError, match="0x0020"):
        parse(TEXT.rstrip().rsplit("\n", 1)[0])


@pytest.mark.parametrize(
    ("opcode", "width"), [("LDS", 4), ("LDS.U16", 2), ("STS.U8", 1), ("LDG.E.64", 8), ("LDGSTS.E.BYPASS.128", 16)]
)
def test_widths(opcode: str, width: int):
    assert decode(0, opcode, 0).width == width
