"""The assembler: the first rule that matches decides, as said by an interpreter, by libseccomp and by the kernel."""

from __future__ import annotations

import struct
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kore.errors import SandboxError
from kore.sandbox.machine import AARCH64, X86_64, number_of
from kore.sandbox.program import INSTRUCTIONS_MAX, assemble
from kore.sandbox.rules import (
    ALLOW,
    KILL_PROCESS,
    LONG,
    Condition,
    Rule,
    Statement,
    is_null,
    refuse,
    word_has_none,
    word_is,
    word_masked_is,
)
from tests import bpf

pyseccomp = pytest.importorskip("pyseccomp")

DEFAULT = refuse(38)
MACHINES = [pytest.param(machine, id=machine.name) for machine in (X86_64, AARCH64)]


def decide(parts, call, *arguments, machine=X86_64):
    number = number_of(call, machine)
    assert number is not None
    return bpf.run(assemble(parts, DEFAULT, machine), number, arguments, audit=machine.audit)


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_get_their_action_and_all_others_the_default(machine):
    parts = [Rule("read", ALLOW), Rule("write", refuse(1)), Rule("mremap", KILL_PROCESS)]
    assert [decide(parts, call, machine=machine) for call in ("read", "write", "mremap", "close")] == [
        ALLOW, refuse(1), KILL_PROCESS, DEFAULT,
    ]  # fmt: skip


def test_the_first_rule_that_matches_decides():
    parts = [Rule("read", refuse(1)), Rule("close", ALLOW), Rule("read", ALLOW)]
    assert decide(parts, "read") == refuse(1)
    parts = [
        Rule("fcntl", refuse(1), (word_is(1, 5),)), Rule("fcntl", ALLOW, (word_is(0, 3),)),
        Rule("fcntl", refuse(2), (word_is(1, 6),)), Rule("fcntl", refuse(3)), Rule("fcntl", ALLOW),
    ]  # fmt: skip
    assert [decide(parts, "fcntl", *arguments) for arguments in ((3, 5), (3, 6), (4, 6), (4, 7))] == [
        refuse(1), ALLOW, refuse(2), refuse(3),
    ]  # fmt: skip


def test_a_condition_that_does_not_hold_leaves_the_call_to_what_follows_even_behind_raw_statements():
    raw = [Statement(0x00, 7), Statement(0x54, 1)]  # they leave 1 in the accumulator
    parts = [Rule("read", refuse(1), (word_is(0, 9),)), *raw, Rule("read", refuse(2), (word_is(0, 8),)), *raw]
    assert [decide(parts, "read", fd) for fd in (9, 8, 7)] == [refuse(1), refuse(2), DEFAULT]
    assert decide([*parts, Rule("close", ALLOW)], "close") == ALLOW


def test_a_raw_statement_stands_where_it_was_given():
    everything = Statement(0x06, ALLOW)
    assert decide([everything, Rule("read", refuse(1))], "read") == ALLOW
    assert decide([Rule("read", refuse(1)), everything], "read") == refuse(1)
    assert decide([Rule("read", refuse(1)), everything], "execve") == ALLOW


def test_a_raw_jump_stays_among_raw_statements():
    over = [Statement(0x05, 1), Statement(0x06, KILL_PROCESS), Statement(0x00, 0)]
    assert decide([*over, Rule("read", ALLOW)], "read") == ALLOW
    assert decide([Statement(0x05, 0), Rule("read", ALLOW)], "read") == ALLOW
    for jump in (1, 2, 0xFFFFFFFF):
        with pytest.raises(SandboxError, match="jumps behind"):
            assemble([Statement(0x05, jump), Rule("read", ALLOW)], DEFAULT, X86_64)


CONDITIONS = [
    # condition, arguments for which it holds, arguments for which it does not
    (word_is(0, 2), (2, 1 << 32 | 2, LONG << 32 & LONG | 2), (3, 0, 1 << 32)),
    (word_is(0, -100), (0xFFFFFF9C, LONG - 99), (100, 0xFFFFFF9D)),
    (word_has_none(0, 6), (0, 1, 8, 6 << 32), (2, 4, 6, 7, 1 << 40 | 4)),
    (word_masked_is(0, 0xF, 1), (1, 0x81, 1 << 32 | 0x11), (0, 2, 0x13)),
    (is_null(0), (0,), (1, 1 << 32, LONG)),
    (Condition(0, LONG, 1 << 40 | 5), (1 << 40 | 5,), (5, 1 << 40, 1 << 41 | 5)),
    (Condition(0, 0xFF << 32, 3 << 32), (3 << 32, 3 << 32 | 77), (3, 2 << 32)),
    (Condition(0, 0, 0), (0, 1, LONG), ()),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("condition", "holds", "fails"), CONDITIONS)
def test_conditions_look_at_the_bits_of_their_mask(condition, holds, fails, machine):
    parts = [Rule("read", ALLOW, (condition,)), Rule("read", refuse(1))]
    assert {decide(parts, "read", value, machine=machine) for value in holds} == {ALLOW}
    assert {decide(parts, "read", value, machine=machine) for value in fails} <= {refuse(1)}


@pytest.mark.parametrize("index", range(6))
def test_every_argument_can_be_compared(index):
    parts = [Rule("read", ALLOW, (Condition(index, LONG, 7 << 32 | 1),))]
    assert decide(parts, "read", *[7 << 32 | 1 if place == index else 5 for place in range(6)]) == ALLOW
    assert decide(parts, "read", *[5 if place == index else 7 << 32 | 1 for place in range(6)]) == DEFAULT


@pytest.mark.parametrize("machine", MACHINES)
def test_another_machine_is_killed_whatever_it_asks(machine):
    program = assemble([Statement(0x06, ALLOW)], DEFAULT, machine)
    for audit in (0x40000003, 0x40000028, 0xC000003E, 0xC00000B7, 0xC00000F3):
        expected = ALLOW if audit == machine.audit else KILL_PROCESS
        assert bpf.run(program, 0, audit=audit) == expected


def test_the_x32_abi_is_killed():
    program = assemble([Statement(0x06, ALLOW)], DEFAULT, X86_64)
    for number in (0x40000000, 0x40000000 | 59, 0x7FFFFFFF, 0xFFFFFFFF):
        assert bpf.run(program, number) == KILL_PROCESS


def test_what_is_always_allowed_is_decided_without_a_look_at_arguments():
    """The kernel finds out at the installation, and does not run the program for them (seccomp's action cache)."""
    parts = [Rule("mmap", ALLOW, (word_has_none(2, 4),)), Rule("mmap", refuse(13)), Rule("read", ALLOW)]
    program = assemble(parts, DEFAULT, X86_64)
    assert not bpf.run(program, number_of("read", X86_64)).looked
    assert bpf.run(program, number_of("mmap", X86_64)).looked


def test_calls_of_other_machines_are_left_out():
    assert assemble([Rule("open", ALLOW)], DEFAULT, AARCH64) == assemble([], DEFAULT, AARCH64)


def test_a_call_with_more_rules_than_a_short_jump_reaches():
    rules = [Rule("ioctl", refuse(value), (word_is(1, value), word_is(2, value))) for value in range(1, 200)]
    parts = [*rules, Rule("read", ALLOW)]
    assert decide(parts, "read") == ALLOW
    assert [decide(parts, "ioctl", 0, value, value) for value in (1, 150, 199, 200)] == [
        refuse(1), refuse(150), refuse(199), DEFAULT,
    ]  # fmt: skip


def test_a_program_longer_than_the_kernel_takes_is_refused():
    rules = [Rule("ioctl", refuse(1), (word_is(1, value),)) for value in range(INSTRUCTIONS_MAX // 2)]
    with pytest.raises(SandboxError, match=f"instructions, more than the {INSTRUCTIONS_MAX}"):
        assemble(rules, DEFAULT, X86_64)


# libseccomp, asked the same. Its rules are a set, so it is given lists in which the order does not matter: at most one
# action for each call and set of conditions, and no two conditions of a call that can both hold.

CALLS = ("read", "write", "fcntl", "socket", "prctl", "mremap", "kill")
WORDS = st.one_of(st.integers(0, 5), st.integers(0, LONG), st.sampled_from([1 << 31, 1 << 32, (1 << 32) - 1, LONG]))
ACTIONS = st.sampled_from([ALLOW, refuse(1), refuse(13), KILL_PROCESS])


@st.composite
def disjoint_rules(draw):
    """Rules of which no two match the same call: those on one call differ in what one argument is, under one mask."""
    rules = []
    for call in draw(st.sets(st.sampled_from(CALLS), min_size=1)):
        if draw(st.booleans()):
            rules.append(Rule(call, draw(ACTIONS)))
            continue
        index, mask = draw(st.integers(0, 5)), draw(st.one_of(st.just(LONG), st.just(0xFFFFFFFF), WORDS)) or LONG
        for value in draw(st.sets(WORDS.map(lambda word, mask=mask: word & mask), min_size=1, max_size=4)):
            conditions = [Condition(index, mask, value)]
            other = draw(st.integers(0, 5))
            if other != index and draw(st.booleans()):
                other_mask = draw(WORDS) or 1
                conditions.append(Condition(other, other_mask, draw(WORDS) & other_mask))
            rules.append(Rule(call, draw(ACTIONS), tuple(conditions)))
    return rules


def libseccomp_program(rules, machine) -> bytes:
    found = pyseccomp.SyscallFilter(DEFAULT)
    found.set_attr(pyseccomp.Attr.ACT_BADARCH, KILL_PROCESS)
    if machine.audit != pyseccomp.system_arch():
        found.add_arch(machine.audit)
        found.remove_arch(pyseccomp.system_arch())
    for rule in rules:
        if rule.action == DEFAULT:
            continue
        arguments = [
            pyseccomp.Arg(condition.index, pyseccomp.MASKED_EQ, condition.mask, condition.value)
            for condition in rule.conditions
        ]
        found.add_rule_exactly(rule.action, rule.call, *arguments)
    with tempfile.TemporaryFile() as file:
        found.export_bpf(file)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("machine", MACHINES)
@settings(max_examples=300, deadline=None)
@given(rules=disjoint_rules(), values=st.lists(WORDS, min_size=12, max_size=12))
def test_libseccomp_decides_the_same(rules, values, machine):
    ours, theirs = assemble(rules, DEFAULT, machine), libseccomp_program(rules, machine)
    tried = [tuple(values[:6]), tuple(values[6:])]
    for rule in rules:  # and arguments for which a rule holds, exactly and nearly
        exact = list(values[:6])
        for condition in rule.conditions:
            exact[condition.index] = exact[condition.index] & ~condition.mask | condition.value
        tried.append(tuple(exact))
        for condition in rule.conditions:
            near = list(exact)
            near[condition.index] ^= 1 << (condition.mask.bit_length() - 1)
            tried.append(tuple(near))
    for call in (*CALLS, "close"):
        number = number_of(call, machine)
        for arguments in tried:
            expected = bpf.run(theirs, number, arguments, audit=machine.audit)
            assert bpf.run(ours, number, arguments, audit=machine.audit) == expected, (call, arguments)


@st.composite
def any_rules(draw):
    rules = []
    for _ in range(draw(st.integers(1, 30))):
        count = draw(st.integers(0, 3))
        masks = [draw(WORDS) for _ in range(count)]
        conditions = tuple(Condition(draw(st.integers(0, 5)), mask, draw(WORDS) & mask) for mask in masks)
        rules.append(Rule(draw(st.sampled_from(CALLS)), draw(ACTIONS), conditions))
    return rules


@settings(max_examples=300, deadline=None)
@given(rules=any_rules(), values=st.lists(WORDS, min_size=6, max_size=6))
def test_order_is_kept_whatever_the_rules_are(rules, values):
    """Against the plainest reading of the promise: go through the list and stop at the first that matches."""
    program = assemble(rules, DEFAULT, X86_64)
    for call in CALLS:
        expected = next(
            (
                rule.action
                for rule in rules
                if rule.call == call and all(values[c.index] & c.mask == c.value for c in rule.conditions)
            ),
            DEFAULT,
        )
        assert bpf.run(program, number_of(call, X86_64), values) == expected


def test_the_program_is_an_array_of_sock_filter():
    program = assemble([], DEFAULT, X86_64)
    assert struct.unpack_from("=HBBI", program) == (0x20, 0, 0, 4)
    assert struct.unpack_from("=HBBI", program, len(program) - 8) == (0x06, 0, 0, DEFAULT)
