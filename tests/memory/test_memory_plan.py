"""Which plan is chosen, on numbers alone."""

from dataclasses import replace

import pytest

from keras_woodfisher.memory.plan import MemoryNeeds, SharedBytes
from keras_woodfisher.memory.planning import MemoryBudget, least_plan, plan_memory

MIB = 2**20
G = 512 * 2**18 * 4  # 512 MiB
LOTS = 2**40

NEEDS = MemoryNeeds(
    samples=512,
    columns=2**18,
    most=512,
    weights=2**18,
    widest=2000,
    blocks=132,
    chunk=32,
    sample_bytes=5 * MIB,
    usual_bytes=3 * MIB,
    reading_bytes=3 * MIB,
    ring_bytes=0,
    lanes=2,
    kernels=1,
    block_bytes=lambda m, lanes: lanes * m * 40_000,
    panel=8192,
)
VECTORS = 40 * 2**18
# Samples and blocks that wait beside the place of the gradients.
SAMPLING = 3 * MIB + 32 * 5 * MIB
STAGED = SAMPLING + 32 * 2**20


def means(limit, disk=LOTS, **kwargs):
    return MemoryBudget(limit, "memory_limit", "/there", disk, **kwargs)


def check(plan, limit):
    """What holds of every plan."""
    assert plan.total <= limit
    assert plan.total == plan.gradients + plan.vectors + plan.ring + max(plan.sampling, plan.blocks)
    assert 1 <= plan.chunk <= 32 and 1 <= plan.lanes <= 2
    assert "memory plan" in str(plan) and plan.as_dict()["total"] == plan.total
    return plan


def test_all_in_memory_to_the_byte():
    limit = G + VECTORS + SAMPLING
    plan = check(plan_memory(NEEDS, means(limit)), limit)
    assert (plan.storage, plan.total, plan.gradients, plan.stored, plan.pages) == ("memory", limit, G, 0, 1)
    assert (plan.chunk, plan.lanes) == (32, 2)
    assert "512.0 MiB in memory" in str(plan)
    plan = check(plan_memory(NEEDS, means(limit - 1)), limit - 1)
    assert (plan.storage, plan.gradients, plan.stored, plan.folder) == ("disk", 0, G, "/there")
    assert "512.0 MiB on disk in /there" in str(plan)


def test_work_becomes_smaller_on_disk_only_where_it_must():
    limit = VECTORS + STAGED
    plan = check(plan_memory(NEEDS, means(limit)), limit)
    assert (plan.storage, plan.chunk, plan.total) == ("disk", 32, limit)
    plan = check(plan_memory(NEEDS, means(limit - 1)), limit - 1)
    assert (plan.storage, plan.chunk, plan.lanes) == ("disk", 31, 2)
    # Two blocks at work take 47 MiB: one of them is left first where less is free.
    limit = VECTORS + 40 * MIB
    plan = check(plan_memory(NEEDS, means(limit)), limit)
    assert (plan.storage, plan.chunk, plan.lanes) == ("disk", 6, 1)


def test_without_disk_a_page_at_a_time():
    limit = VECTORS + 256 * MIB
    plan = check(plan_memory(NEEDS, means(limit, disk=G - 1)), limit)
    assert plan.storage == "recomputed" and plan.chunk < 32
    assert plan.pages == -(-NEEDS.columns // plan.page) >= 3
    assert plan.gradients == 4 * 512 * plan.page
    # Work has half of what there is, pages the rest.
    assert plan.gradients >= 128 * MIB
    assert "taken again for each page" in str(plan)
    assert check(plan_memory(NEEDS, means(limit, disk=G)), limit).storage == "disk"


def test_memory_with_less_work_goes_before_pages():
    limit = G + VECTORS + SAMPLING - 1
    plan = check(plan_memory(NEEDS, means(limit, disk=0)), limit)
    assert (plan.storage, plan.chunk) == ("memory", 31)


def test_float16_takes_half():
    plan = check(plan_memory(NEEDS, means(G, dtype="float16")), G)
    assert (plan.storage, plan.dtype, plan.gradients) == ("memory", "float16", G // 2)
    plan = check(plan_memory(NEEDS, means(300 * MIB, dtype="float16")), 300 * MIB)
    assert (plan.storage, plan.stored) == ("disk", G // 2)


def test_where_gradients_were_asked_to_be():
    plan = check(plan_memory(NEEDS, means(LOTS, place="disk")), LOTS)
    assert (plan.storage, plan.gradients, plan.stored) == ("disk", 0, G)
    plan = check(plan_memory(NEEDS, means(LOTS, place="cuda:0", disk=0)), LOTS)
    assert (plan.storage, plan.gradients, plan.stored, plan.folder) == ("cuda:0", 0, G, "")
    with pytest.raises(MemoryError, match=r"On disk they would take 512.0 MiB, and 1.0 MiB are free in /there.*TMPDIR"):
        plan_memory(NEEDS, means(LOTS, place="disk", disk=MIB))


ONE = replace(NEEDS, widest=2**18, blocks=1)


def test_pages_of_one_block():
    whole = check(plan_memory(ONE, means(LOTS)), LOTS)
    assert (whole.storage, whole.pages) == ("memory", 1)
    plan = check(plan_memory(ONE, means(LOTS, pages=4)), LOTS)
    assert (plan.storage, plan.pages, plan.page) == ("disk", 4, 2**16)
    # A page, and for each of two lanes the columns that it works on and those before.
    assert plan.blocks == 2 * 512 * 40_000 + G // 4 + 2 * 2 * 4 * 512 * 8192
    assert "read in 4 pages" in str(plan)
    # A page of a quarter doesn't fit here, one of an eighth does.
    plan = check(plan_memory(ONE, means(180 * MIB, pages=4)), 180 * MIB)
    assert (plan.storage, plan.pages) == ("disk", 8)
    plan = check(plan_memory(ONE, means(LOTS, pages=4, disk=0)), LOTS)
    assert (plan.storage, plan.pages, plan.lanes, plan.gradients) == ("recomputed", 4, 1, G // 4)
    plan = check(plan_memory(ONE, means(220 * MIB)), 220 * MIB)
    assert (plan.storage, plan.page) == ("disk", 8192)


def test_the_ring_counts():
    needs = replace(NEEDS, ring_bytes=G)
    limit = 2 * G + VECTORS + SAMPLING
    assert check(plan_memory(needs, means(limit)), limit).storage == "memory"
    assert check(plan_memory(needs, means(limit - 1)), limit - 1).storage == "disk"
    with pytest.raises(MemoryError, match="num_grads=512 for 262,144 weights needs at least 5") as error:
        plan_memory(needs, means(G))
    # What the message proposes does fit, and one more doesn't.
    number = int(str(error.value).split("fit: num_grads=")[1].split(",")[0])
    assert 450 < number < 512
    fewer = replace(needs, samples=number, most=number, ring_bytes=G * number // 512)
    check(plan_memory(fewer, means(G)), G)
    more = replace(needs, samples=number + 1, most=number + 1, ring_bytes=G * (number + 1) // 512)
    with pytest.raises(MemoryError):
        plan_memory(more, means(G))


@pytest.mark.parametrize("disk", [0, LOTS])
@pytest.mark.parametrize("needs", [NEEDS, ONE, replace(NEEDS, widest=20_000, blocks=14)])
def test_what_fits_is_found_and_told(needs, disk):
    with pytest.raises(MemoryError, match=r"MiB may be used \(memory_limit\)") as error:
        plan_memory(needs, means(VECTORS, disk=disk))
    text = str(error.value)
    assert ("On disk they would take" in text) == (disk == 0)
    limit = int(text.split('memory_limit="')[1].split(" MiB", maxsplit=1)[0]) * MIB
    check(plan_memory(needs, means(limit, disk=disk)), limit)
    with pytest.raises(MemoryError):
        plan_memory(needs, means(limit - MIB, disk=disk))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("disk", [0, LOTS])
def test_the_least_plan_is_the_least_that_fits(disk, dtype):
    for needs in (NEEDS, ONE, replace(NEEDS, widest=20_000, blocks=14)):
        least = least_plan(needs, means(LOTS, disk=disk, dtype=dtype)).total
        check(plan_memory(needs, means(least, disk=disk, dtype=dtype)), least)
        with pytest.raises(MemoryError):
            plan_memory(needs, means(least - 1, disk=disk, dtype=dtype))


def test_every_limit_is_kept_or_refused():
    for needs in (NEEDS, ONE, replace(NEEDS, widest=20_000, blocks=14), replace(NEEDS, most=2048)):
        for dtype in ("float32", "float16"):
            for disk in (0, G // 2, LOTS):
                fits = []
                for limit in range(8 * MIB, 900 * MIB, 24 * MIB):
                    try:
                        check(plan_memory(needs, means(limit, disk=disk, dtype=dtype)), limit)
                        fits.append(True)
                    except MemoryError:
                        fits.append(False)
                assert fits == sorted(fits) and fits[-1]


def test_an_update_is_within_the_plan_or_not():
    plan = plan_memory(replace(NEEDS, most=1024), means(LOTS))
    assert plan.covers(512, 2**18) and plan.covers(1024, 2**17)
    assert not plan.covers(512, 2**18 + 1) and not plan.covers(1025, 100)


def shared(samples):
    """Of one of four processes; pieces of 10 MiB are on their way."""
    return SharedBytes(samples * 2**20 // 4, samples * 2**20 // 4 + MIB, 50 * MIB)


def test_processes_have_rows_then_columns_and_both_while_they_exchange_them():
    needs = replace(NEEDS, shared=shared, sample_bytes=MIB, usual_bytes=MIB // 2)
    rows, columns, exchange = 128 * MIB, 129 * MIB, 307 * MIB
    plan = plan_memory(needs, means(LOTS))
    assert (plan.storage, plan.rows, plan.gradients, plan.exchange) == ("memory", rows, columns, exchange)
    assert plan.total == plan.expected == VECTORS + exchange
    assert "129.0 MiB in memory, 307.0 MiB while processes exchange them" in str(plan)
    # Taking samples is the peak, and less of it is expected.
    more = plan_memory(replace(needs, sample_bytes=8 * MIB), means(LOTS))
    assert more.total == VECTORS + rows + 3 * MIB + 32 * 8 * MIB and more.expected == VECTORS + exchange
    less = plan_memory(replace(needs, sample_bytes=8 * MIB), means(VECTORS + exchange))
    assert less.chunk == 22 and less.total == VECTORS + exchange
    # So are blocks, with what processes find of their columns on its way.
    wide = plan_memory(replace(needs, block_bytes=lambda m, lanes: lanes * 200 * MIB), means(LOTS))
    assert wide.total == VECTORS + columns + 2 * 200 * MIB + 32 * 2**18
    one = plan_memory(replace(needs, block_bytes=lambda m, lanes: lanes * 200 * MIB), means(wide.total - 1))
    assert one.lanes == 1
    with pytest.raises(MemoryError, match="more processes, on other machines") as error:
        plan_memory(needs, means(VECTORS + exchange - MIB))
    # What doesn't depend on samples is taken into account.
    number = int(str(error.value).split("fit: num_grads=")[1].split(",")[0])
    assert 505 < number < 512 and least_plan(needs, means(0)).total == VECTORS + exchange
    plan_memory(replace(needs, samples=number, most=number), means(VECTORS + exchange - MIB))
