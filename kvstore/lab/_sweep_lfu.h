/* Least frequently used; of those used equally often, the one whose last use is longest ago.
 *
 * Blocks of one count are in one list, and the counts that have a block in a chain, least first. Counts end at MOST_USES:
 * nothing used so often leaves anyway.
 */
#ifndef KVTIERS_SWEEP_LFU_H
#define KVTIERS_SWEEP_LFU_H

#include "_sweep_policy.h"

enum { MOST_USES = 1 << 16, COUNTS = 0 }; /* the chain's own node stands for the count 0, which no block has */

typedef struct {
    Link *links, *chain;
    int32_t *uses;
    int32_t num_blocks;
} Frequency;

static void *make_frequency(Memory *memory, int32_t num_blocks, int64_t capacity)
{
    (void)capacity;
    Frequency *frequency = new_array(memory, 1, sizeof *frequency);
    if (frequency != NULL) {
        frequency->links = new_links(memory, num_blocks, MOST_USES + 1);
        frequency->chain = new_links(memory, MOST_USES + 1, 0);
        frequency->uses = new_array(memory, (size_t)num_blocks, sizeof *frequency->uses);
        frequency->num_blocks = num_blocks;
    }
    return frequency;
}

/* Put a block that is in no list to those used so often. below: a count that is in the chain, not far below. */
static void frequency_put(Frequency *frequency, int32_t block, int32_t uses, int32_t below)
{
    int32_t list = frequency->num_blocks + uses;
    if (is_empty(frequency->links, list)) {
        int32_t above = frequency->chain[below].next;
        while (above != COUNTS && above < uses)
            above = frequency->chain[above].next;
        append_block(frequency->chain, above, uses);
    }
    frequency->uses[block] = uses;
    append_block(frequency->links, list, block);
}

static void frequency_take(Frequency *frequency, int32_t block)
{
    unlink_block(frequency->links, block);
    if (is_empty(frequency->links, frequency->num_blocks + frequency->uses[block]))
        unlink_block(frequency->chain, frequency->uses[block]);
}

static void frequency_add(void *order, int32_t block, int is_hit) { frequency_put(order, block, 1 + is_hit, COUNTS); }

static void frequency_touch(void *order, int32_t block)
{
    Frequency *frequency = order;
    int32_t uses = frequency->uses[block], below = frequency->chain[uses].prev;
    frequency_take(frequency, block);
    frequency_put(frequency, block, uses + (uses < MOST_USES), below);
}

static int64_t frequency_victims(void *order, int64_t n, int32_t *out)
{
    Frequency *frequency = order;
    int64_t found = 0;
    for (int32_t uses = frequency->chain[COUNTS].next; uses != COUNTS && found < n; uses = frequency->chain[uses].next)
        found += first_of(frequency->links, frequency->num_blocks + uses, n - found, out + found);
    return found;
}

static void frequency_discard(void *order, int32_t block) { frequency_take(order, block); }

static const PolicyKind LFU = {
    .name = "lfu",
    .make = make_frequency,
    .add = frequency_add,
    .touch = frequency_touch,
    .victims = frequency_victims,
    .leave = frequency_discard,
    .discard = frequency_discard,
};

#endif
