/* A cache of single blocks, as simulators of web caches have it: each reference is a request of its own, prefixes mean
 * nothing, and room is made before a block comes. For comparing policies with those simulators. */
#ifndef KVTIERS_SWEEP_FLAT_H
#define KVTIERS_SWEEP_FLAT_H

#include "_sweep_policy.h"

typedef struct {
    const PolicyKind *kind;
    void *order;
    uint8_t *is_held;
    int64_t used, capacity, hits;
} FlatCache;

static void make_flat(FlatCache *cache, Memory *memory, const PolicyKind *kind, int32_t num_blocks, int64_t capacity)
{
    cache->kind = kind;
    cache->order = kind->make(memory, num_blocks, capacity);
    cache->is_held = new_array(memory, (size_t)num_blocks, 1);
    cache->capacity = capacity;
}

static inline void flat_access(FlatCache *cache, int32_t block)
{
    const PolicyKind *kind = cache->kind;
    if (cache->is_held[block]) {
        cache->hits++;
        if (kind->touch != NULL)
            kind->touch(cache->order, block);
        return;
    }
    if (kind->expect != NULL)
        kind->expect(cache->order, block);
    int32_t victim;
    while (cache->used == cache->capacity && kind->victims(cache->order, 1, &victim)) {
        kind->leave(cache->order, victim);
        cache->is_held[victim] = 0;
        cache->used--;
    }
    kind->add(cache->order, block, 0);
    cache->is_held[block] = 1;
    cache->used++;
}

#endif
