/* Belady's MIN over the requests of a trace: whatever is used again last leaves first (kvstore/lab/optimum.py).
 *
 * Blocks wait in queues by the request that uses them next. What is in a queue stays there until it leaves or that
 * request comes, since between now and its next use nothing uses it. The block of a path that lies deepest comes into
 * its queue first: what is above it is used at least as late. So a queue, first in first out, gives deepest first, and
 * the optimum keeps prefixes whole. A tree of bits finds the last queue that has a block. O(1) a reference.
 */
#ifndef KVTIERS_SWEEP_MIN_H
#define KVTIERS_SWEEP_MIN_H

#include "_sweep_links.h"

enum { BIT_LEVELS = 6 }; /* of 64 bits each: more than an int32 counts */

typedef struct {
    uint64_t *levels[BIT_LEVELS]; /* a bit of one level says that a word of the level below it is not zero */
    int num_levels;
} BitTree;

static void make_bits(BitTree *bits, Memory *memory, int64_t num_bits)
{
    do {
        num_bits = (num_bits + 63) / 64;
        bits->levels[bits->num_levels++] = new_array(memory, (size_t)num_bits, sizeof(uint64_t));
    } while (num_bits > 1);
}

static void set_bit(BitTree *bits, int64_t at)
{
    for (int level = 0; level < bits->num_levels; level++, at >>= 6)
        bits->levels[level][at >> 6] |= (uint64_t)1 << (at & 63);
}

static void clear_bit(BitTree *bits, int64_t at)
{
    for (int level = 0; level < bits->num_levels; level++, at >>= 6)
        if (bits->levels[level][at >> 6] &= ~((uint64_t)1 << (at & 63)))
            return;
}

/* The highest bit that is set; there must be one. */
static int64_t last_bit(const BitTree *bits)
{
    int64_t at = 0;
    for (int level = bits->num_levels - 1; level >= 0; level--)
        at = at << 6 | (63 - __builtin_clzll(bits->levels[level][at]));
    return at;
}

typedef struct {
    Link *links; /* a queue for each request, and one more for what is not used again */
    uint8_t *is_held;
    BitTree bits;
    int32_t num_blocks;
    int64_t num_held, capacity;
} Optimum;

static void make_optimum(Optimum *optimum, Memory *memory, int32_t num_blocks, int32_t num_requests, int64_t capacity)
{
    optimum->links = new_links(memory, num_blocks, num_requests + 1);
    optimum->is_held = new_array(memory, (size_t)num_blocks, 1);
    make_bits(&optimum->bits, memory, (int64_t)num_requests + 1);
    optimum->num_blocks = num_blocks;
    optimum->capacity = capacity;
}

static void optimum_trim(Optimum *optimum, int64_t room)
{
    while (optimum->num_held > optimum->capacity - room) {
        int64_t queue = last_bit(&optimum->bits);
        int32_t list = optimum->num_blocks + (int32_t)queue, block = optimum->links[list].next;
        unlink_block(optimum->links, block);
        if (is_empty(optimum->links, list))
            clear_bit(&optimum->bits, queue);
        optimum->is_held[block] = 0;
        optimum->num_held--;
    }
}

/* Serve one request; returns how many of its leading blocks were held.
 *
 * next_uses: of each block, the number of the next request that has it, or that of requests for none.
 * must_keep: what comes takes room before it is there, as a cache does that cannot pass anything by; of use for requests
 *            of one block. Else any block may leave, the request's own too.
 */
static int32_t optimum_serve(Optimum *optimum, int32_t request, const int32_t *path, const int32_t *next_uses, int32_t length,
                             int must_keep)
{
    int32_t num_hits = 0;
    while (num_hits < length && optimum->is_held[path[num_hits]])
        num_hits++;
    if (must_keep && !num_hits)
        optimum_trim(optimum, length);
    clear_bit(&optimum->bits, request); /* all that waited for it is on its path */
    for (int32_t i = length - 1; i >= 0; i--) {
        int32_t block = path[i], list = optimum->num_blocks + next_uses[i];
        if (optimum->is_held[block])
            unlink_block(optimum->links, block);
        else
            optimum->num_held++;
        optimum->is_held[block] = 1;
        append_block(optimum->links, list, block);
        set_bit(&optimum->bits, next_uses[i]);
    }
    optimum_trim(optimum, 0);
    return num_hits;
}

#endif
