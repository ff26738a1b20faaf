/* A tier: room for so many blocks, the order in which they leave, and when they are over. */
#ifndef KVTIERS_SWEEP_TIER_H
#define KVTIERS_SWEEP_TIER_H

#include "_sweep_policy.h"

typedef struct {
    uint8_t bit; /* in the places of a block, see Store */
    int64_t capacity, used, written;
    const PolicyKind *kind;
    void *order;
    double ttl_s;      /* 0 for ever */
    Link *by_use;      /* the order of uses is that of deadlines; NULL where nothing is ever over */
    double *used_at;
    int32_t by_use_list;
} Tier;

static void make_tier(Tier *tier, Memory *memory, const PolicyKind *kind, int32_t num_blocks, int64_t capacity, double ttl_s,
                      int number)
{
    tier->bit = (uint8_t)(1 << number);
    tier->capacity = capacity;
    tier->kind = kind;
    tier->order = kind->make(memory, num_blocks, capacity);
    tier->ttl_s = ttl_s;
    if (ttl_s > 0) {
        tier->by_use = new_links(memory, num_blocks, 1);
        tier->used_at = new_array(memory, (size_t)num_blocks, sizeof *tier->used_at);
        tier->by_use_list = num_blocks;
    }
}

static inline void note_use(Tier *tier, int32_t block, double now)
{
    if (tier->by_use != NULL) {
        unlink_block(tier->by_use, block);
        append_block(tier->by_use, tier->by_use_list, block);
        tier->used_at[block] = now;
    }
}

static inline void tier_add(Tier *tier, int32_t block, int is_hit, double now)
{
    tier->used++;
    tier->written++;
    tier->kind->add(tier->order, block, is_hit);
    note_use(tier, block, now);
}

static inline void tier_touch(Tier *tier, int32_t block, double now)
{
    if (tier->kind->touch != NULL)
        tier->kind->touch(tier->order, block);
    note_use(tier, block, now);
}

static inline void tier_leave(Tier *tier, int32_t block)
{
    tier->used--;
    tier->kind->leave(tier->order, block);
    if (tier->by_use != NULL)
        unlink_block(tier->by_use, block);
}

static inline void tier_discard(Tier *tier, int32_t block)
{
    tier->used--;
    tier->kind->discard(tier->order, block);
    if (tier->by_use != NULL)
        unlink_block(tier->by_use, block);
}

/* A block that has just come was used earlier than that: it takes its place among the others. */
static void set_used_at(Tier *tier, int32_t block, double used_at)
{
    int32_t before = tier->by_use[block].prev;
    while (before != tier->by_use_list && tier->used_at[before] > used_at)
        before = tier->by_use[before].prev;
    unlink_block(tier->by_use, block);
    append_block(tier->by_use, tier->by_use[before].next, block);
    tier->used_at[block] = used_at;
}

/* The block whose deadline comes first, -1 if none has passed. */
static inline int32_t next_expired(const Tier *tier, double now)
{
    if (tier->by_use == NULL)
        return -1;
    int32_t block = tier->by_use[tier->by_use_list].next;
    return block != tier->by_use_list && tier->used_at[block] + tier->ttl_s <= now ? block : -1;
}

#endif
