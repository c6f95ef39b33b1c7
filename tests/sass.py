"""Machine code as nvdisasm prints it: instructions, the source lines they come from, loops, loads in flight."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

JUMPS = {"BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT"}
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}

SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
LABEL = re.compile(r"([.$\w]+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;")


@cache
def source_lines(path):
    return Path(path).read_text(errors="replace").splitlines()


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128.CONSTANT
    operands: str
    origin: tuple  # (file, line number), then those of the calls by which it was inlined

    @property
    def name(self):
        return self.opcode.split(".")[0]

    @property
    def bytes(self):
        """What a lane loads or stores."""
        return next((BYTES[m] for m in self.opcode.split(".") if m in BYTES), 4)

    @property
    def address(self):
        """Base and offset of what it loads or stores."""
        base, offset = re.search(r"\[([^][]+?)(?:\+(-?0x[0-9a-f]+))?\](?:,|$)", self.operands).groups()
        return base, int(offset or "0", 16)

    @property
    def registers(self):
        """The numbers of those that the operands name, for reading or writing."""
        named = re.findall(r"\bR(\d+)(\.64)?", self.operands)
        return {int(n) + high for n, is_pair in named for high in range(2 if is_pair else 1)}

    @property
    def loaded(self):
        """The registers that a load fills."""
        first = re.search(r"\bR(\d+)", self.operands.split("[")[0])
        return {int(first[1]) + k for k in range((self.bytes + 3) // 4)} if first else set()

    def is_from(self, text):
        """Whether one of the source lines that it comes from holds the text."""
        return any(text in source_lines(path)[line - 1] for path, line in self.origin)


@dataclass
class Code:
    """A kernel without the subroutines of CUDA's own arithmetic, such as the slow path of a division."""

    instructions: list = field(default_factory=list)
    targets: dict = field(default_factory=dict)  # index of the instruction after each label

    def named(self, *names):
        return [i for i in self.instructions if i.name in names]

    def branches(self):
        """Index of each branch and of the instruction that it leads to."""
        for index, instruction in enumerate(self.instructions):
            if label := re.search(r"\.L_x_\d+", instruction.operands if instruction.name == "BRA" else ""):
                yield index, self.targets[label[0]]

    def loops(self):
        """First and last index of each loop: a branch back, and all that it leads back over."""
        return {(target, index) for index, target in self.branches() if target < index}

    def runs(self):
        """The global loads, by index, that each straight run of instructions has in flight: issued before one is used.

        A branch ends the run, and so does an instruction that another one branches to.
        """
        run, awaited, heads = [], set(), set(self.targets.values())
        for index, instruction in enumerate(self.instructions):
            if run and (index in heads or instruction.name in JUMPS or instruction.registers & awaited):
                yield run
                run, awaited = [], set()
            if instruction.name == "LDG":
                run.append(index)
                awaited |= instruction.loaded
        if run:
            yield run

    def in_flight(self):
        """The longest run of each innermost loop that loads; without such a loop, that of the whole code."""
        runs, loops = list(self.runs()), self.loops()
        innermost = [loop for loop in loops if not any(is_inside(other, loop) for other in loops)]
        of_loops = [[run for run in runs if first <= run[0] <= last] for first, last in innermost]
        return [max(of_loop, key=len) for of_loop in of_loops if of_loop] or [max(runs, key=len, default=[])]

    def streamed(self, text, element):
        """Of the loads that come from one source line: the most in flight, and the instructions an element, in words.

        Those are the instructions of the innermost loop around these loads, or of all the code if there is none,
        divided by the elements of so many bytes that they load by this line. It is a bound where a branch can skip
        some of them, and loops inside this one are not counted, but named.
        """
        runs = [[index for index in run if self.instructions[index].is_from(text)] for run in self.runs()]
        longest = max(runs, key=len, default=[])
        if not longest:
            return 0, ""
        around = [(first, last) for first, last in self.loops() if first <= longest[0] <= last]
        body = min(around, key=lambda loop: loop[1] - loop[0], default=(0, len(self.instructions) - 1))
        inside = [loop for loop in self.loops() if is_inside(loop, body)]
        counted = set(range(body[0], body[1] + 1)).difference(*(range(first, last + 1) for first, last in inside))
        code = [self.instructions[index] for index in counted]
        elements = sum(i.bytes for i in code if i.name == "LDG" and i.is_from(text)) / element
        skips = any(index in counted and index < target <= body[1] for index, target in self.branches())
        return len(longest), f"{'<= ' * skips}{len(code) / elements:.1f}{' + loops' * bool(inside)}"


def is_inside(loop, other):
    return loop != other and other[0] <= loop[0] and loop[1] <= other[1]


def read(section):
    """The Code in a text section that `nvdisasm -gi` has printed."""
    code, origin, is_ours, was_source = Code(), (), True, False
    for row in section.splitlines():
        if source := SOURCE.match(row):
            origin = (*(origin if was_source else ()), (source[1], int(source[2])))
        elif label := LABEL.match(row):
            if not label[1].startswith(".L_"):  # a function
                is_ours = "$__cuda_" not in label[1]
            elif is_ours:
                code.targets[label[1]] = len(code.instructions)
        elif is_ours and (instruction := INSTRUCTION.match(row)) and instruction[1] != "NOP":
            code.instructions.append(Instruction(*instruction.groups(), origin))
        was_source = bool(source)
    return code
