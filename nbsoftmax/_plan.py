"""The regimes as data: which kernel walks a folded array, in what pieces."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ._semantics import LOGSUMEXP

VECTOR_BYTES = 64
ALONG_PANEL = 4  # vectors: four independent exps hide each other's latency


@dataclass(frozen=True)
class Limits:
    """Where one regime gives way to the next.

    Never a function of the number of threads: the regime decides the order of summation, and
    results must not depend on who computes them.
    """

    # Rows up to this long are turned in registers, a vector's worth of rows at a time, and longer
    # ones walked four at a time: so what begins and ends a row is done for many at once. By itself
    # it takes 220 cycles or more. Turning pays up to 50 to 90 (float32) or 32 to 48 (float64),
    # four at a time up to 500 to 900 or 250 to 400; for logsumexp, which turns once and keeps no
    # terms, up to twice that (Zen 4).
    short_float32_elements: int = 64
    short_float64_elements: int = 32
    beside_float32_elements: int = 640
    beside_float64_elements: int = 320
    beside_rows: int = 4
    # Rows this short, without gaps, are dealt to columns, which takes n (n - 1) permutations for a
    # vector's worth of them: 1.2 to 2.5 times faster than turning squares. Each length is compiled.
    dealt_float32_elements: int = 5
    dealt_float64_elements: int = 4
    # Rows this short are turned two vectors' worth at a time, if there are so many: what ends a row
    # is a chain of instructions that wait for each other, and two chains take turns. A tenth to a
    # third faster for up to 5 numbers, 3 to 10 % for more; of few rows, half of a pair is empty.
    paired_elements: int = 32
    paired_rows: int = 128
    # Longer lanes are cut into blocks, and read twice: 1.5 copies at least. A whole one up to this
    # long takes 1.2 to 1.4 (Zen 4, 1 MB of second-level cache a core), for what is read again has
    # not gone far. With 2 MB it would still win, but each thread keeps the terms of a lane.
    lane_bytes: int = 1024 * 1024
    # Blocks are big enough that merging them costs nothing, and small enough that what was read for
    # the maximum is still in cache when its terms are summed.
    block_bytes: int = 64 * 1024
    # Few lanes are cut earlier, so that there is work for every core.
    few_lanes: int = 16
    few_lanes_bytes: int = 64 * 1024
    # Across: one panel (up to 128 bytes wide) of all rows in cache, or blocks of rows. As much as
    # the second-level cache holds pays, up to 2.5 times: the rows behind are in the third level,
    # and x is read once. Each thread keeps a copy of a panel and its terms.
    panel_bytes: int = 1024 * 1024
    panel_block_bytes: int = 64 * 1024
    # Of an x larger than this, and so in memory, logsumexp takes blocks of rows at once: what comes
    # next is then fetched while a block is summed. 6 to 30 % faster; in cache up to 8 % slower.
    far_bytes: int = 20 * 1024 * 1024
    # Lanes of this length go by single vectors: for two, some constants leave the registers, 10 to
    # 20 %. Shorter ones are all beginnings and ends, and longer ones want more of each row at once.
    narrow_panel_least: int = 8
    narrow_panel_most: int = 1024
    # More panels than this are laid where whole vectors begin; the two at the ends are not whole
    # then, and of 4 panels they take a quarter of the time.
    unshifted_panels: int = 16
    # Planes of so many vectors, whose results lie off whole vectors, have their last panel wrap
    # from each row to the next: up to 2.5 times faster than any other way past the cache. It begins
    # and ends by itself, which in smaller planes takes longer.
    wrapped_vectors: int = 128
    few_panels: int = 16
    few_panels_bytes: int = 32 * 1024
    # logsumexp of so few numbers is so often near 0, in one of the lanes of a vector, that all are
    # summed as it wants.
    careful_elements: int = 5
    # A few neighbouring lanes, less than a vector, are walked along, their elements in turn, if
    # they hold so many: across, most of a vector is empty. 2 to 7 times faster.
    taking_turns_elements: int = 16
    # Where vectors begin with other lanes, there is one sum for each vector of a panel, and more to
    # join at the end: it takes so many rows to pay, up to 3 times.
    odd_turns_rows: int = 64
    # Fewer neighbouring lanes than this are packed to rows: none, which takes 40 us to begin.
    narrow_elements: int = 2
    # Up to this, a call that machine code knows (`_direct`) holds the interpreter's lock meanwhile:
    # 5 us in float32, 10 in float64.
    brief_bytes: int = 64 * 1024
    # Below this one thread is done before it could have told another; below the second, only those
    # that listen help: to wake one takes 30 to 50 us (Zen 4), and 100 to 200 where a virtual
    # machine's core sleeps, too.
    serial_bytes: int = 192 * 1024
    wake_bytes: int = 3 * 1024 * 1024
    # Work is taken in chunks: some for each thread, so that all end together, but none so small
    # that its first items, which run without overlap, count: two chunks of 16 long rows are a third
    # faster than eight of 4.
    chunks_per_thread: int = 4
    chunk_bytes: int = 32 * 1024
    chunk_items: int = 16
    # Outputs larger than this are stored past the cache: a third of the last-level cache, as x and
    # out lie there together with what others have. A third faster from there on; who reads the
    # result at once waits for memory instead, and gains from 12 MB on (Zen 4).
    past_cache_bytes: int = 10 * 1024 * 1024
    # Across, a block's results of all lanes, up to this size, may wait until they fill whole lines.
    # Blocks are made as small as that where they keep so many rows.
    slab_bytes: int = 256 * 1024
    slab_rows: int = 64
    # What large results leave is kept for the next ones, up to so much.
    kept_bytes: int = 256 * 1024 * 1024
    # Items up to this long are fetched while the item before them is worked on: so nothing is
    # missed where one ends. Longer ones so many bytes (4 to 16 KB are alike) or rows ahead.
    next_item_bytes: int = 64 * 1024
    ahead_bytes: int = 4096
    ahead_rows: int = 32
    # Arrays that no kernel walks are packed to rows in pieces of this size.
    packed_bytes: int = 512 * 1024


LIMITS = Limits()
_when_changed: list[Callable[[], object]] = []


def on_change(forget: Callable[[], object]) -> None:
    """Have ``forget`` called when the limits change: for whoever remembers plans."""
    _when_changed.append(forget)


@contextlib.contextmanager
def using(**changes: int) -> Iterator[Limits]:
    """Other limits for a while: for tests that lead small arrays into every regime."""
    global LIMITS
    before = LIMITS
    LIMITS = dataclasses.replace(before, **changes)
    for forget in _when_changed:
        forget()
    try:
        yield LIMITS
    finally:
        LIMITS = before
        for forget in _when_changed:
            forget()


@dataclass(frozen=True)
class Plan:
    """How a folded array is walked."""

    walk: str  # along, beside, across, short or packed
    panel: int = 1  # vectors side by side
    block: int = 0  # lane elements of one block; n if the lane is not cut
    past_cache: bool = False
    lanes: int = 1  # along: whose elements take turns; n and block count them all
    dealt: bool = False  # short: not turned but dealt, if there are no gaps between rows

    def blocks(self, n: int) -> int:
        return max(1, -(-n // self.block))


def chunk_items(items: int, item_bytes: int, group: int, threads: int, wakes: bool) -> int:
    """How many items a thread takes at a time, whole groups of them.

    Threads that are woken come at different times; those that listen begin together.
    """
    least = -(-LIMITS.chunk_bytes // max(1, item_bytes))
    share = -(-items // (LIMITS.chunks_per_thread * threads if wakes else threads))
    overlapped = min(LIMITS.chunk_items, -(-items // threads))  # as long as all have some
    return -(-max(1, least, share, overlapped) // group) * group


def ahead(walk: str, item_bytes: int, itemsize: int) -> int:
    """How many positions ahead of the walk is fetched; 0 for the next item."""
    if walk != "short" and item_bytes <= LIMITS.next_item_bytes:
        return 0
    return LIMITS.ahead_rows if walk == "across" else LIMITS.ahead_bytes // itemsize


def _across_panel(n: int, inner: int, width: int) -> int:
    """One vector side by side, or two; four would spill registers and gain nothing."""
    alone = LIMITS.narrow_panel_least <= n <= LIMITS.narrow_panel_most
    return 1 if alone or inner <= width else 2


def _panel_in_turns(n: int, inner: int, width: int) -> int:
    """Vectors that hold as many elements of each of a few lanes; 0 if those are walked across."""
    odd = inner // (inner & -inner)
    if not 1 < inner < width or odd > 5:
        return 0
    if odd == 1:  # so does a single vector
        return ALONG_PANEL if n * inner >= LIMITS.taking_turns_elements else 0
    return odd if n >= LIMITS.odd_turns_rows else 0


def plan(
    op: str,
    outer: int,
    n: int,
    inner: int,
    compute_itemsize: int,
    result_itemsize: int,
    runs: bool = False,
    alone: bool = False,
    dense: bool = False,
) -> Plan:
    """The regime of an array folded to ``(outer, n, inner)``. First line that holds wins.

    ``runs`` says that the lane is of several runs, n their vectors' elements; ``alone`` that
    one thread does it all, for which few lanes need not be cut; ``dense`` that rows across follow
    each other without gaps.
    """
    limits = LIMITS
    width = VECTOR_BYTES // compute_itemsize
    writes = 0 if op == LOGSUMEXP else outer * n * inner * result_itemsize
    past_cache = writes > limits.past_cache_bytes
    if runs and inner == 1:  # their last vectors are not whole
        past_cache = False
    short = {4: limits.short_float32_elements, 8: limits.short_float64_elements}[compute_itemsize]
    beside = {4: limits.beside_float32_elements, 8: limits.beside_float64_elements}[
        compute_itemsize
    ]
    if op == LOGSUMEXP:
        short, beside = 2 * short, 2 * beside
    deals = {4: limits.dealt_float32_elements, 8: limits.dealt_float64_elements}[compute_itemsize]
    lanes = 1
    in_turns = _panel_in_turns(n, inner, width) if dense else 0
    if in_turns:
        n, inner, lanes = n * inner, 1, inner
    if inner > 1:
        if inner < limits.narrow_elements:
            return Plan("packed")
        panel = _across_panel(n, inner, width)
        row = panel * VECTOR_BYTES
        few = not alone and outer * -(-inner // (panel * width)) < limits.few_panels
        most = limits.few_panels_bytes if few else limits.panel_bytes
        if op == LOGSUMEXP and outer * n * inner * compute_itemsize > limits.far_bytes:
            most = min(most, limits.panel_block_bytes)
        if n * row > most:
            block = max(8, limits.panel_block_bytes // row)
            slab = limits.slab_bytes // (inner * max(compute_itemsize, result_itemsize))
            if slab >= limits.slab_rows:
                block = min(block, slab)
            return Plan("across", panel, block, past_cache)
        return Plan("across", panel, n, past_cache)
    of_rows = not runs and lanes == 1
    if n <= short and outer >= width // 2 and of_rows:
        paired = n <= limits.paired_elements and outer >= limits.paired_rows
        return Plan("short", 2 if paired else 1, n, past_cache, dealt=1 < n <= deals)
    if n <= beside and outer >= 2 * limits.beside_rows and of_rows:
        return Plan("beside", limits.beside_rows, n, past_cache)
    if 4 * n <= 3 * short and runs:  # and more to copying such rows and turning them
        return Plan("packed")
    panel = in_turns or ALONG_PANEL
    few = outer < limits.few_lanes and not alone
    if n * compute_itemsize > (limits.few_lanes_bytes if few else limits.lane_bytes):
        block = limits.block_bytes // compute_itemsize
        if runs or lanes > 1:
            block = -(-block // (panel * width)) * panel * width
        return Plan("along", panel, block, past_cache, lanes)
    return Plan("along", panel, n, past_cache, lanes)
