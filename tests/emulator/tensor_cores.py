"""Products of matrices. PTX ISA, "Warp Level Matrix Instructions", "Asynchronous Warpgroup Level Matrix ...".

Products and sums are in fp32, as numpy rounds them; a card truncates some of them.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.emulator.machine import WARP, instruction, unknown
from tests.emulator.memory import Fault
from tests.emulator.program import Constant, Instruction, Vector
from tests.emulator.types import TYPES
from tests.emulator.warps import LANE, registers_as

GROUP, THREAD = LANE // 4, LANE % 4  # of a lane: its row among eight, its place in the row
GROUP_OF_WARPS = 4 * WARP  # threads that execute a wgmma together
HALVES = ("f16", "bf16")  # types of factors


def _rows_and_columns(registers, parts):
    """Where lane, register and part lie in a left factor of 16 rows: ([32, registers, parts], the same)."""
    register, part = np.arange(registers)[:, None], np.arange(parts)
    rows = np.broadcast_to(GROUP[:, None, None] + 8 * (register % 2), (WARP, registers, parts))
    return rows, THREAD[:, None, None] * parts + part + register // 2 * 4 * parts


def _left(values):
    """Registers [threads, registers, parts] of a left factor -> matrices [warps, 16, k]."""
    _, registers, parts = values.shape
    rows, columns = _rows_and_columns(registers, parts)
    matrix = np.empty((len(values) // WARP, 16, columns.max() + 1), values.dtype)
    matrix[:, rows, columns] = values.reshape(-1, WARP, registers, parts)
    return matrix


@instruction("mma")
def _multiply(blocks, given, active):
    """mma.sync.aligned.m16n8k16.row.col.f32.type.type.f32 d, a, b, c: of each warp d = a b + c."""
    blocks.whole_warps(given, active)
    d, a, b, c = (operand.parts for operand in given.operands)
    kind = given.words[7]
    if given.words[3:7] != ["m16n8k16", "row", "col", "f32"] or kind not in HALVES:
        raise unknown(given)
    left = _left(registers_as(blocks, a, kind))
    values = registers_as(blocks, b, kind)
    parts = values.shape[2]
    place = THREAD[:, None, None] * parts + np.arange(parts) + np.arange(len(b))[:, None] * 4 * parts
    right = np.empty((len(left), place.max() + 1, 8), values.dtype)
    right[:, place, GROUP[:, None, None]] = values.reshape(-1, WARP, *values.shape[1:])
    product = left.astype(np.float32) @ right.astype(np.float32)
    for number, (result, start) in enumerate(zip(d, c, strict=True)):
        added = product[:, GROUP + number // 2 * 8, 2 * THREAD + number % 2].reshape(-1)
        blocks.write(result, "f32", added + blocks.read(start, "f32"), active)


@instruction("ldmatrix")
def _load_matrices(blocks, given, active):
    """Matrices of 8 x 8 values of 16 bits; lane 8 i + j has the address of row j of matrix i."""
    blocks.whole_warps(given, active)
    to = blocks.parts(given.operands[0])
    givers = active & (np.arange(blocks.n) % WARP < 8 * len(to))
    places = blocks.shared.places(blocks.address(given.operands[1], "u32")[givers], 16, blocks.block[givers])
    rows = blocks.shared.load(places, blocks.actors(givers)).view(np.uint16).reshape(-1, len(to), 8, 8)
    matrices = rows.swapaxes(2, 3) if "trans" in given.words else rows
    pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, len(to), WARP)
    for number, register in enumerate(to):
        values = np.zeros((blocks.n // WARP, WARP), np.uint32)
        values[active[::WARP]] = pairs[:, number]
        blocks.write(register, "b32", values.ravel(), active)


@instruction("stmatrix")
def _store_matrices(blocks, given, active):
    """The inverse of ldmatrix."""
    blocks.whole_warps(given, active)
    of = blocks.parts(given.operands[1])
    pairs = np.stack([blocks.read(register, "b32").reshape(-1, WARP)[active[::WARP]] for register in of], 1)
    matrices = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, len(of), 8, 8)
    matrices = matrices.swapaxes(2, 3) if "trans" in given.words else matrices
    givers = active & (np.arange(blocks.n) % WARP < 8 * len(of))
    places = blocks.shared.places(blocks.address(given.operands[0], "u32")[givers], 16, blocks.block[givers])
    rows = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
    blocks.shared.store(places, rows, blocks.actors(givers))


@dataclass
class Product:
    """A wgmma that was issued, until its group was waited for.

    Attributes:
        blocks: A mask of the blocks that have not waited for it.
        commits: How many groups each block had committed before.
        left: Values [threads, registers, parts] of a left factor in registers, and these registers.
        places: Indices in shared memory of the tiles [groups, rows, k], by the number of the operand.
        add: Whether d is added, for each thread.
        now: When it was issued.
    """

    given: Instruction
    blocks: np.ndarray
    commits: np.ndarray
    add: np.ndarray
    now: int
    left: dict[str, np.ndarray] | None = None
    places: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass
class Sums:
    """What products on their way add to: [threads, registers], and a mask of the blocks where it is so."""

    values: np.ndarray
    blocks: np.ndarray


class Products:
    """The asynchronous products of the blocks, executed as late as they may be: when somebody waits for them.

    While a product is on its way its sums are NaN in the registers, so that code that does not wait shows.
    """

    def __init__(self, blocks):
        self.pending = []
        self.commits = np.zeros(blocks.count, np.int64)
        self.fenced = np.zeros(blocks.count, bool)
        self.sums = {}  # by their registers


def _products(blocks):
    return blocks.state.setdefault("wgmma", Products(blocks))


def _blocks_of(blocks, active):
    """A mask of blocks, all of whose threads must be there."""
    threads = active.reshape(blocks.count, blocks.threads)
    if (threads.any(1) != threads.all(1)).any():
        raise Fault("only a part of a block executes an asynchronous product, which is not known")
    return threads.all(1)


@instruction("wgmma")
def _group_product(blocks, given, active):
    products, here = _products(blocks), _blocks_of(blocks, active)
    match given.words[1]:
        case "fence":
            products.fenced |= here
        case "commit_group":
            products.commits[here] += 1
        case "wait_group":
            _wait(blocks, products, here, given.operands[0].bits)
        case "mma_async":
            _issue(blocks, products, given, active, here)
        case _:
            raise unknown(given)


def _issue(blocks, products, given, active, here):
    """wgmma.mma_async.sync.aligned.m64nNkK.dtype.atype.btype d, a, b, add, scale a, scale b, transposed a, b;"""
    if not products.fenced[here].all():
        raise Fault("an asynchronous product with no wgmma.fence before it")
    d, a, _, add, *rest = given.operands
    if [operand.bits for operand in rest[:2]] != [1, 1] or given.words[5] != "f32" or given.words[6] not in HALVES:
        raise unknown(given, "only sums of fp32 that are not negated are")
    new = Sums(np.zeros((blocks.n, len(d.parts)), np.float32), np.zeros(blocks.count, bool))
    sums = products.sums.setdefault(d.parts, new)
    begins = (here & ~sums.blocks)[blocks.block]
    for number, register in enumerate(d.parts):
        sums.values[begins, number] = blocks.read(register, "f32")[begins]
        blocks.write(register, "b32", np.full(blocks.n, 0xFFFFDEAD, np.uint32), active)
    sums.blocks |= here
    adds = blocks.read(add, "pred") if not isinstance(add, Constant) else np.full(blocks.n, bool(add.bits))
    product = Product(given, here.copy(), products.commits.copy(), adds, blocks.shared.now)
    if isinstance(a, Vector):
        product.left = {register.name: blocks.bits(register.name) for register in a.parts}
    columns = _columns(given)
    for number, rows in (() if product.left else ((1, 64),)) + ((2, columns),):
        transposed = rest[2 + (number == 2 and not product.left)].bits if len(rest) > 2 else 0
        product.places[number] = _tile(blocks, given, given.operands[number], rows, bool(transposed), here)
        _read_tile(blocks, product.places[number], here, None)
    products.pending.append(product)


def _columns(given):
    """Of the result: m64n128k16 -> 128."""
    return int(given.words[4].split("n")[1].split("k")[0])


def _tile(blocks, given, operand, rows, transposed, here):
    """The indices in shared memory of each value's first byte, [groups of warps, rows, k], from a matrix descriptor.

    PTX ISA, "Matrix Descriptor Format" and "Shared Memory Layout": start, leading and stride offset are in units of 16
    bytes. A row (of a transposed factor: a column) takes as many bytes as the swizzle, in pieces of eight.
    """
    descriptors = blocks.read(operand, "u64").reshape(-1, GROUP_OF_WARPS)
    groups = here[blocks.block[::GROUP_OF_WARPS]]
    descriptors = np.where(groups[:, None], descriptors, descriptors[groups][:1])  # other blocks have none yet
    if (descriptors != descriptors[:, :1]).any():
        raise Fault("the threads of a warp group give different descriptors")

    def field(bit, mask):
        return (descriptors[:, :1, None] >> np.uint64(bit) & np.uint64(mask)).astype(np.int64)

    start, lead, step = (field(bit, 0x3FFF) * 16 for bit in (0, 16, 32))
    modes = {*field(62, 3).flat}
    if len(modes) > 1 or field(49, 7).any():
        raise unknown(given, "descriptors with a base offset or of several swizzles")
    swizzle = {1: 128, 2: 64, 3: 32}[modes.pop()]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if not transposed:
        offset = row % 8 * swizzle + row // 8 * step + k * 2
    else:
        across = row * 2  # along the rows, which lie together
        offset = across % swizzle + k % 8 * swizzle + across // swizzle * lead + k // 8 * step
    at = start + offset
    at = at ^ (at >> 7 & swizzle // 16 - 1) << 4
    if at.max() + 2 > blocks.shared.size:
        raise Fault(f"an asynchronous product reads byte {at.max()} of {blocks.shared.size} bytes of shared memory")
    return at + (blocks.block[::GROUP_OF_WARPS] * blocks.shared.size)[:, None, None]


def _read_tile(blocks, places, here, since):
    for group in np.flatnonzero(here[blocks.block[::GROUP_OF_WARPS]]):
        thread = group * GROUP_OF_WARPS
        epoch = int(blocks.epochs[blocks.block[thread]])
        blocks.shared.load_asynchronously(places[group], int(blocks.warps[thread]), epoch, since)


def _wait(blocks, products, here, left):
    """Until at most `left` groups are on their way."""
    for product in products.pending:
        due = product.blocks & here & (product.commits < products.commits - left)
        if due.any():
            _multiply_groups(blocks, products, product, due)
            product.blocks &= ~due
    products.pending = [product for product in products.pending if product.blocks.any()]
    products.fenced &= ~here
    for registers, sums in products.sums.items():
        done = here & sums.blocks
        for product in products.pending:
            if product.given.operands[0].parts == registers:
                done &= ~product.blocks
        for number, register in enumerate(registers):
            blocks.write(register, "f32", sums.values[:, number].copy(), done[blocks.block])
        sums.blocks &= ~done
    products.sums = {registers: sums for registers, sums in products.sums.items() if sums.blocks.any()}


def _multiply_groups(blocks, products, product, due):
    given, threads = product.given, due[blocks.block]
    columns = _columns(given)
    factors = {}
    for number, places in product.places.items():
        _read_tile(blocks, places, due, product.now)
        factors[number] = _values(blocks, places, given.words[5 + number])
    if product.left:
        for name, bits in product.left.items():
            if (blocks.bits(name) != bits)[threads].any():
                raise Fault(f"register {name} is written while an asynchronous product reads it")
        a = registers_as(blocks, given.operands[1].parts, given.words[6])
        factors[1] = _left(a).reshape(-1, 64, 16)
    left, right = (factors[number].astype(np.float32) for number in (1, 2))
    result = left @ right.swapaxes(1, 2)  # [groups, 64, columns]
    lane = np.arange(GROUP_OF_WARPS)
    row = (lane // WARP * 16 + lane % WARP // 4)[:, None, None, None] + 8 * np.arange(2)[:, None]
    column = (lane % 4 * 2)[:, None, None, None] + 8 * np.arange(columns // 8)[:, None, None] + np.arange(2)
    values = result[:, row, column].reshape(blocks.n, columns // 2)
    sums = products.sums[given.operands[0].parts].values
    total = np.where(product.add[:, None], sums, np.float32(0)) + values
    sums[threads] = total[threads]


def _values(blocks, places, type_name):
    data = blocks.shared.bytes[places[..., None] + np.arange(2)]
    return TYPES[type_name].decode(np.ascontiguousarray(data).view(np.uint16).reshape(-1)).reshape(places.shape)
