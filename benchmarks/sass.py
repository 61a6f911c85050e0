"""Reads machine code as nvdisasm prints it: opcodes, pipes, and the way that is usually taken.

*The common case* is the way through the basic blocks that loads and stores most bytes of global
memory, and of such ways the one of fewest instructions: a full tile, without what is only done to
divide the rarest numbers, to repair huge maxima, or to sum carefully again, for none of which a
kernel loads anything. Threads of a warp do not diverge on it, and a subroutine is entered only if
it must be. Where a loop loads the numbers it is one turn of that loop. It would flatter a kernel
with a branch around common work that loads nothing; neither side has one.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cuda.pathfinder import find_nvidia_binary_utility

_LINE = re.compile(
    r"^\s*\.section\s+\.text\.(?P<function>\w+)"
    r"|^(?P<label>[.$][\w$.]+):"
    r"|/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);",
    re.MULTILINE,
)
_WIDTH = re.compile(r"\.(ENL2\.256|128|64|U?S?16|U?S?8)\b")
_BITS = {"ENL2.256": 256, "128": 128, "64": 64, "16": 16, "8": 8}
_CALL = 10**6  # instructions: what no way takes that can avoid it

# Where an instruction is carried out. Of two that match, the first.
PIPES = {
    "double": r"D(ADD|MUL|FMA|SETP|MNMX)",
    "fma": r"F(FMA|ADD|MUL)|IMAD|H(FMA|ADD|MUL)2",
    "mufu": r"MUFU|F2F\b|F2I|I2F\b|FLO|POPC|BREV",
    "shuffle": r"SHFL|VOTE|MATCH|REDUX",
    "memory": r"(LD|ST)[GSLC]?\b|ATOM|RED\b|U?LDC|MAPA",
    "uniform": r"U[A-Z]|R2UR|S2UR|VOTEU",
    "control": r"BRA|EXIT|BSSY|BSYNC|BREAK|BAR|B2R|CALL|RET|WARPSYNC|NOP|C?S2R|DEPBAR|ERRBAR|"
    r"MEMBAR|BMOV|YIELD|CCTL|ACQBULK",
    "alu": r"F(MNMX|SETP|SEL|SET|CHK|2FP)|LOP|PLOP|SHF|SHL|SHR|IADD|ISETP|ICMP|PRMT|LEA|SEL|"
    r"V?I?MNMX|VIADD|VIMNMX|MOV|P2R|R2P|IABS|BMSK|SGXT|I2FP|HMNMX|HSETP|HSET",
}


@dataclass(frozen=True)
class Instruction:
    """One line of a function."""

    opcode: str
    operands: str
    guard: str | None  # the predicate under which it counts
    labels: tuple[str, ...]  # that stand before it

    @property
    def global_bits(self) -> int:
        """What it moves between registers and global memory."""
        if not re.match(r"(LD|ST)G?\b", self.opcode):
            return 0
        width = _WIDTH.search(self.opcode)
        return _BITS[width[1].lstrip("US")] if width else 32

    @property
    def loads(self) -> bool:
        """Whether it reads global memory."""
        return self.opcode.startswith("LD") and self.global_bits > 0

    @property
    def pipe(self) -> str:
        """Where it is carried out."""
        found = (name for name, pattern in PIPES.items() if re.match(pattern, self.opcode))
        return next(found, "other")

    @property
    def calls(self) -> bool:
        """Whether it enters a subroutine."""
        return self.opcode.startswith("CALL") and "$" in self.operands

    def registers(self) -> list[int]:
        """Return the numbers of the registers that it names."""
        return [int(number) for number in re.findall(r"\bR(\d+)\b", self.operands)]


@dataclass(frozen=True)
class Case:
    """What a thread carries out in the common case: all, or one turn of the loop that loads."""

    instructions: list[Instruction]
    beside: int  # the instructions before and after the loop

    @property
    def loads(self) -> list[int]:
        """The bytes of each load of global memory."""
        return [i.global_bits // 8 for i in self.instructions if i.loads]

    @property
    def ahead(self) -> int:
        """How many loads are issued before the first instruction that waits for one."""
        awaited: set[int] = set()
        count = 0
        for i in self.instructions:
            named = i.registers()
            if awaited.intersection(named):
                break
            if i.loads:
                count += 1
                awaited.update(range(named[0], named[0] + max(1, i.global_bits // 32)))
        return count

    @property
    def pipes(self) -> Counter[str]:
        """Count the instructions of each pipe."""
        return Counter(i.pipe for i in self.instructions)

    @property
    def opcodes(self) -> Counter[str]:
        """Count the instructions by their names without modifiers."""
        return Counter(i.opcode.partition(".")[0] for i in self.instructions)


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    """Return the instructions of each function of a file."""
    disassembler = find_nvidia_binary_utility("nvdisasm")
    if disassembler is None:
        raise SystemExit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    command = [disassembler, "-c", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Instruction]] = {}
    function, labels = "", []
    for match in _LINE.finditer(text):
        if match["function"]:
            function, labels = match["function"], []
        elif match["label"]:
            labels.append(match["label"])
        else:
            line = Instruction(match["opcode"], match["operands"], match["guard"], tuple(labels))
            found.setdefault(function, []).append(line)
            labels = []
    return found


def registers(said: str) -> int:
    """Read how many registers a thread has from what the assembler says."""
    return int(_number(r"Used (\d+) registers", said))


def spilled(said: str) -> int:
    """Read how many bytes go to memory and back for want of registers."""
    stores, loads = (_number(rf"(\d+) bytes spill {way}", said) for way in ("stores", "loads"))
    return int(stores) + int(loads)


def _number(pattern: str, said: str) -> str:
    found = re.search(pattern, said)
    if found is None:
        raise RuntimeError(f"the assembler does not say what a kernel needs: {said}")
    return found[1]


def common_case(function: list[Instruction]) -> Case:
    """Find what a thread usually carries out."""
    blocks, follows = _blocks(function)
    order, back = _walk(follows)

    def way(start: int, inside: set[int], end: int | None) -> list[int]:
        """Return the common blocks from ``start`` to ``end``, or to where the function returns."""

        @cache
        def best(block: int) -> tuple[int, int, tuple[int, ...]]:
            moved = sum(i.global_bits for i in blocks[block])
            cost = sum(_CALL if i.calls else 1 for i in blocks[block])
            if block == end:
                return moved, -cost, (block,)
            ways = [best(b) for b in follows[block] if (block, b) not in back and b in inside]
            ends = end is None and blocks[block][-1].opcode == "EXIT"
            # A way that leads nowhere counts as one that moves nothing.
            then = max(ways, default=(0, 0, ()) if ends else (-(10**9), 0, ()))
            return moved + then[0], then[1] - cost, (block, *then[2])

        return list(best(start)[2])

    turns = []
    for latch, header in back:
        inside = _loop(header, latch, follows)
        turn = way(header, inside, latch)
        loaded = sum(i.global_bits for b in turn for i in blocks[b] if i.loads)
        turns.append((loaded, -len(turn), turn))
    whole = way(0, set(order), None)
    loaded, _, turn = max(turns, default=(0, 0, []))
    chosen = turn if loaded else whole
    beside = sum(len(blocks[b]) for b in whole if loaded and b not in turn)
    # Some assemblers put many NOPs where a slow unit would have them wait anyway.
    return Case([i for b in chosen for i in blocks[b] if i.opcode != "NOP"], beside)


def _blocks(function: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Cut a function into basic blocks, and say which may follow each."""
    blocks: list[list[Instruction]] = [[]]
    places: dict[str, int] = {}
    for i in function:
        if i.labels and blocks[-1]:
            blocks.append([])
        places.update(dict.fromkeys(i.labels, len(blocks) - 1))
        blocks[-1].append(i)
        if re.match(r"BRA|EXIT|RET|CALL", i.opcode):
            blocks.append([])
    follows = [list(_following(n, block, places, len(blocks))) for n, block in enumerate(blocks)]
    return blocks, follows


def _following(
    number: int, block: list[Instruction], places: dict[str, int], count: int
) -> Iterator[int]:
    through = True
    if block:
        last = block[-1]
        always = last.guard is None
        # A jump may name a predicate beside its target. BRA.DIV leads to the threads of a warp one
        # after the other; some loops are left by a call that does not return.
        jump = re.fullmatch(r"(.*?)`\((\.L.+)\)\s*", last.operands)
        if jump and re.match(r"(BRA|CALL)\b(?!\.DIV)", last.opcode):
            yield places[jump[2]]
            through = not (always and jump[1].strip(" ,") == "")
        elif re.match(r"EXIT|RET", last.opcode):
            through = not always
    if through and number + 1 < count:
        yield number + 1


def _walk(follows: list[list[int]]) -> tuple[list[int], set[tuple[int, int]]]:
    """Return the blocks that can be reached, and the edges that lead back to a loop's first."""
    seen: list[int] = []
    active: set[int] = set()
    back: set[tuple[int, int]] = set()
    stack = [(0, iter(follows[0]))]
    seen.append(0)
    active.add(0)
    while stack:
        block, rest = stack[-1]
        for b in rest:
            if b in active:
                back.add((block, b))
            elif b not in seen:
                seen.append(b)
                active.add(b)
                stack.append((b, iter(follows[b])))
                break
        else:
            active.discard(block)
            stack.pop()
    return seen, back


def _loop(header: int, latch: int, follows: list[list[int]]) -> set[int]:
    """Return the blocks of a loop."""
    inside = {header, latch}
    grown = True
    while grown:
        more = {
            b
            for b, ways in enumerate(follows)
            if b not in inside and b != header and inside.intersection(ways) - {header}
        }
        grown = bool(more)
        inside |= more
    return inside
