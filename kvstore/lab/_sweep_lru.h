/* Recency, and its poor relation: the order of uses (LRU), and the order of arrivals (FIFO). */
#ifndef KVTIERS_SWEEP_LRU_H
#define KVTIERS_SWEEP_LRU_H

#include "_sweep_policy.h"

typedef struct {
    Link *links;
    int32_t list;
} Recency;

static void *make_recency(Memory *memory, int32_t num_blocks, int64_t capacity)
{
    (void)capacity;
    Recency *recency = new_array(memory, 1, sizeof *recency);
    if (recency != NULL) {
        recency->links = new_links(memory, num_blocks, 1);
        recency->list = num_blocks;
    }
    return recency;
}

static void recency_add(void *order, int32_t block, int is_hit)
{
    (void)is_hit;
    Recency *recency = order;
    append_block(recency->links, recency->list, block);
}

static void recency_touch(void *order, int32_t block)
{
    Recency *recency = order;
    unlink_block(recency->links, block);
    append_block(recency->links, recency->list, block);
}

static int64_t recency_victims(void *order, int64_t n, int32_t *out)
{
    Recency *recency = order;
    return first_of(recency->links, recency->list, n, out);
}

static void recency_discard(void *order, int32_t block)
{
    Recency *recency = order;
    unlink_block(recency->links, block);
}

static const PolicyKind LRU = {
    .name = "lru",
    .touches_new = 1,
    .make = make_recency,
    .add = recency_add,
    .touch = recency_touch,
    .victims = recency_victims,
    .leave = recency_discard,
    .discard = recency_discard,
};
static const PolicyKind FIFO = {
    .name = "fifo",
    .make = make_recency,
    .add = recency_add,
    .victims = recency_victims,
    .leave = recency_discard,
    .discard = recency_discard,
};

#endif
