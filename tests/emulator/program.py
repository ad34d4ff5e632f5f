"""PTX text as a list of instructions. PTX ISA, chapters "Syntax" and "Instruction Operands"."""

import re
from dataclasses import dataclass, field
from functools import cached_property

WIDTHS = {"pred": 1}  # of register types; the others end with their bits


@dataclass(frozen=True)
class Register:
    """A register, or a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An immediate value: the bits of a float, or of an integer in 64 bits."""

    bits: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    parts: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: "Operand"
    offset: int


@dataclass(frozen=True)
class Symbol:
    """The name of a label, a parameter or a variable in shared memory."""

    name: str


Operand = Register | Constant | Vector | Address | Symbol


@dataclass
class Instruction:
    """@!guard name operands; — `words` are the parts of the name: add.rn.f32 has three."""

    text: str
    guard: Register | None
    negated: bool
    name: str
    operands: list[Operand]
    words: list[str] = field(init=False)

    def __post_init__(self):
        self.words = self.name.split(".")

    @property
    def type(self):
        return self.words[-1]


class Program:
    """The one kernel of a PTX module.

    Attributes:
        parameters: Their names, in order.
        instructions: The code.
        labels: The number of the instruction after each label.
        widths: Bits of each register that is declared by its name, and of each prefix declared as %r<100>.
    """

    def __init__(self, text):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        head, body = text.split(".entry", 1)[1].split("{", 1)
        self.parameters = re.findall(r"(\w+_param_\d+)", head)
        self.instructions = []
        self.labels = {}
        self.widths = {}
        body = re.split(r"\n\s*\.(?:section|file)\b", body)[0]
        body = re.sub(r"^\s*\.(?:loc|pragma)\b[^\n]*$", "", body, flags=re.MULTILINE)
        body = re.sub(r"\{([^{};]*)\}", r"<\1>", body)  # vectors, so that the braces left are those of scopes
        for statement in re.split(r"[;{}]", body):
            self._add(" ".join(statement.split()))

    @cached_property
    def leaders(self):
        """Where threads may be that wait for others: targets of branches, what follows a branch, barriers."""
        places = {0, len(self.instructions), *self.labels.values()}
        for number, instruction in enumerate(self.instructions):
            if instruction.words[0] in ("bra", "ret"):
                places.add(number + 1)
            elif instruction.name == "bar.sync":
                places |= {number, number + 1}
        return sorted(places)

    @cached_property
    def shared_unit(self):
        """Bytes that every access to shared memory moves at least."""
        sizes = [16]
        for instruction in self.instructions:
            words = instruction.words
            if any(word.startswith("shared") for word in words) and words[0] in ("ld", "st"):
                count = next((int(word[1:]) for word in words if word in ("v2", "v4")), 1)
                sizes.append(count * int(re.sub(r"\D", "", words[-1])) // 8)
            elif (words[0] == "cp" and len(instruction.operands) > 2) or words[0] == "wgmma":
                sizes.append(4)
        return min(sizes)

    def _add(self, statement):
        while label := re.match(r"([\w$]+):\s*", statement):
            self.labels[label[1]] = len(self.instructions)
            statement = statement[label.end() :]
        if statement.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
            width = WIDTHS.get(kind) or int(re.sub(r"\D", "", kind))
            self.widths |= {re.sub(r"<\d+>", "<>", name.strip()): width for name in names.split(",")}
        elif statement and not statement.startswith("."):
            guard, name, rest = re.match(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", statement).groups()
            operands = [self._operand(word) for word in _split(rest)]
            register = Register(guard.lstrip("!")) if guard else None
            self.instructions.append(Instruction(statement, register, "!" in (guard or ""), name, operands))

    def _operand(self, word):
        if word.startswith("<"):
            return Vector(tuple(self._operand(part) for part in _split(word[1:-1])))
        if word.startswith("["):
            base, _, offset = word[1:-1].replace(" ", "").partition("+")
            return Address(self._operand(base), int(offset or "0", 0))
        if word.startswith("%") or word == "_" or word in self.widths:
            return Register(word)
        if re.match(r"0[fFdD][0-9a-fA-F]+$", word):
            return Constant(int(word[2:], 16))
        if re.match(r"-?\d+U?$|-?0[xX]", word):
            return Constant(int(word.rstrip("U"), 0) & (1 << 64) - 1)
        return Symbol(word)

    def width(self, register):
        """Bits of a register; 1 for a predicate."""
        return self.widths.get(register) or self.widths[re.sub(r"\d+$", "<>", register)]


def _split(text):
    """The operands, at the commas that no bracket contains."""
    found, depth, word = [], 0, ""
    for letter in text + ",":
        depth += (letter in "[<") - (letter in "]>")
        if letter == "," and not depth:
            found.append(word.strip())
            word = ""
        else:
            word += letter
    return [each for each in found if each]
