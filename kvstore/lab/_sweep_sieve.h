/* SIEVE: one queue, one bit, one hand; the twin of eviction/sieve.py, where the lists are drawn. */
#ifndef KVTIERS_SWEEP_SIEVE_H
#define KVTIERS_SWEEP_SIEVE_H

#include "_sweep_policy.h"

enum { SIEVE_LISTS = 3, SIEVE_USED = 1, SIEVE_CONDEMNED = 2, SIEVE_HELD = 4 };

typedef struct {
    Link *links;
    uint8_t *flags;
    int32_t ahead, passed, condemned; /* lists; the first two change places when the hand comes to the newest end */
    int64_t num_free;                 /* blocks that are not held */
} Sieve;

static void *make_sieve(Memory *memory, int32_t num_blocks, int64_t capacity)
{
    (void)capacity;
    Sieve *sieve = new_array(memory, 1, sizeof *sieve);
    if (sieve != NULL) {
        sieve->links = new_links(memory, num_blocks, SIEVE_LISTS);
        sieve->flags = new_array(memory, (size_t)num_blocks, 1);
        sieve->ahead = num_blocks;
        sieve->passed = num_blocks + 1;
        sieve->condemned = num_blocks + 2;
    }
    return sieve;
}

static void sieve_wrap(Sieve *sieve)
{
    if (is_empty(sieve->links, sieve->ahead)) {
        int32_t ahead = sieve->passed;
        sieve->passed = sieve->ahead;
        sieve->ahead = ahead;
    }
}

static void sieve_add(void *order, int32_t block, int is_hit)
{
    Sieve *sieve = order;
    sieve->flags[block] = is_hit ? SIEVE_USED : 0;
    append_block(sieve->links, sieve->ahead, block);
    sieve->num_free++;
}

/* A condemned block goes behind the hand, as if the hand had met its bit set, and cleared it. */
static int sieve_pardon(Sieve *sieve, int32_t block)
{
    if (!(sieve->flags[block] & SIEVE_CONDEMNED))
        return 0;
    unlink_block(sieve->links, block);
    append_block(sieve->links, sieve->passed, block);
    sieve->flags[block] = 0;
    sieve_wrap(sieve);
    return 1;
}

static void sieve_touch(void *order, int32_t block)
{
    Sieve *sieve = order;
    if (!sieve_pardon(sieve, block))
        sieve->flags[block] |= SIEVE_USED;
}

static void sieve_hold(void *order, int32_t block)
{
    Sieve *sieve = order;
    sieve_pardon(sieve, block);
    sieve->flags[block] |= SIEVE_HELD;
    sieve->num_free--;
}

static void sieve_release(void *order, int32_t block)
{
    Sieve *sieve = order;
    sieve->flags[block] &= (uint8_t)~SIEVE_HELD;
    sieve->num_free++;
}

static int64_t sieve_victims(void *order, int64_t n, int32_t *out)
{
    Sieve *sieve = order;
    n = n < sieve->num_free ? n : sieve->num_free;
    int64_t found = first_of(sieve->links, sieve->condemned, n, out);
    while (found < n) {
        int32_t block = sieve->links[sieve->ahead].next;
        unlink_block(sieve->links, block);
        if (sieve->flags[block]) { /* the bit of a held one is for what was before */
            if (!(sieve->flags[block] & SIEVE_HELD))
                sieve->flags[block] = 0;
            append_block(sieve->links, sieve->passed, block);
        } else {
            sieve->flags[block] = SIEVE_CONDEMNED;
            append_block(sieve->links, sieve->condemned, block);
            out[found++] = block;
        }
        sieve_wrap(sieve);
    }
    return found;
}

static void sieve_discard(void *order, int32_t block)
{
    Sieve *sieve = order;
    unlink_block(sieve->links, block);
    sieve->num_free--;
    sieve_wrap(sieve);
}

static const PolicyKind SIEVE = {
    .name = "sieve",
    .make = make_sieve,
    .add = sieve_add,
    .touch = sieve_touch,
    .hold = sieve_hold,
    .release = sieve_release,
    .victims = sieve_victims,
    .leave = sieve_discard,
    .discard = sieve_discard,
};

#endif
