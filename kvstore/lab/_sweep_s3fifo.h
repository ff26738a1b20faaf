/* S3-FIFO: a small queue on trial, a main queue, and names of what failed; the twin of eviction/s3fifo.py.
 *
 * There a policy is not told the capacity, and goes by what it holds. `s3fifo-paper` is told: shares are of the capacity,
 * and before the first eviction what finds the small queue full goes to main. So libCacheSim has it.
 */
#ifndef KVTIERS_SWEEP_S3FIFO_H
#define KVTIERS_SWEEP_S3FIFO_H

#include "_sweep_policy.h"

#define SMALL_SHARE 0.1
#define GHOST_SHARE 0.9 /* of the one that is told; the other remembers as many names as it has had blocks */

enum { S3_SMALL, S3_MAIN, S3_CONDEMNED_SMALL, S3_CONDEMNED, S3_NOWHERE, MOST_TIMES = 3 };

typedef struct {
    Link *links; /* lists by place; the condemned are in one, in the order in which they leave */
    Link *names; /* the ghost: of what left the small queue */
    uint8_t *place, *uses, *is_held, *is_ghost;
    int64_t length[S3_NOWHERE], num_held, num_names;
    int64_t most;                 /* blocks at one time that were not held */
    int64_t capacity, small_size; /* 0 of the one that is not told */
    int32_t first_list;
    int has_evicted, is_named; /* is_named: what comes was in the ghost when it was asked for */
} S3Fifo;

static void *make_s3fifo(Memory *memory, int32_t num_blocks, int64_t capacity)
{
    (void)capacity;
    S3Fifo *fifo = new_array(memory, 1, sizeof *fifo);
    if (fifo != NULL) {
        fifo->links = new_links(memory, num_blocks, S3_NOWHERE);
        fifo->names = new_links(memory, num_blocks, 1);
        fifo->place = new_array(memory, (size_t)num_blocks, 1);
        fifo->uses = new_array(memory, (size_t)num_blocks, 1);
        fifo->is_held = new_array(memory, (size_t)num_blocks, 1);
        fifo->is_ghost = new_array(memory, (size_t)num_blocks, 1);
        fifo->first_list = num_blocks;
    }
    return fifo;
}

static void *make_told_s3fifo(Memory *memory, int32_t num_blocks, int64_t capacity)
{
    S3Fifo *fifo = make_s3fifo(memory, num_blocks, capacity);
    if (fifo != NULL) {
        fifo->capacity = capacity;
        fifo->small_size = (int64_t)((double)capacity * SMALL_SHARE);
    }
    return fifo;
}

static int32_t s3fifo_list(const S3Fifo *fifo, int place)
{
    return fifo->first_list + (place == S3_CONDEMNED_SMALL ? S3_CONDEMNED : place);
}

static void s3fifo_put(S3Fifo *fifo, int32_t block, int place, int uses)
{
    append_block(fifo->links, s3fifo_list(fifo, place), block);
    fifo->length[place]++;
    fifo->place[block] = (uint8_t)place;
    fifo->uses[block] = (uint8_t)uses;
}

static void s3fifo_take(S3Fifo *fifo, int32_t block)
{
    unlink_block(fifo->links, block);
    fifo->length[fifo->place[block]]--;
}

static void s3fifo_forget(S3Fifo *fifo, int32_t block)
{
    unlink_block(fifo->names, block);
    fifo->is_ghost[block] = 0;
    fifo->num_names--;
}

static int64_t s3fifo_free(const S3Fifo *fifo)
{
    const int64_t *length = fifo->length;
    return length[S3_SMALL] + length[S3_MAIN] + length[S3_CONDEMNED_SMALL] + length[S3_CONDEMNED] - fifo->num_held;
}

/* Of the one that is told: the name is looked up, and forgotten, before room is made. */
static void s3fifo_expect(void *order, int32_t block)
{
    S3Fifo *fifo = order;
    fifo->is_named = fifo->is_ghost[block];
    if (fifo->is_named)
        s3fifo_forget(fifo, block);
}

static void s3fifo_add(void *order, int32_t block, int is_hit)
{
    S3Fifo *fifo = order;
    int is_early = fifo->capacity && !fifo->has_evicted && fifo->length[S3_SMALL] >= fifo->small_size;
    int to_main = is_hit || fifo->is_ghost[block] || fifo->is_named || is_early;
    s3fifo_put(fifo, block, to_main ? S3_MAIN : S3_SMALL, is_hit);
    fifo->is_named = 0;
    int64_t num_free = s3fifo_free(fifo);
    fifo->most = num_free > fifo->most ? num_free : fifo->most;
}

static int s3fifo_pardon(S3Fifo *fifo, int32_t block)
{
    if (fifo->place[block] < S3_CONDEMNED_SMALL)
        return 0;
    s3fifo_take(fifo, block);
    s3fifo_put(fifo, block, S3_MAIN, 0);
    return 1;
}

static void s3fifo_touch(void *order, int32_t block)
{
    S3Fifo *fifo = order;
    if (!s3fifo_pardon(fifo, block) && fifo->uses[block] < MOST_TIMES)
        fifo->uses[block]++;
}

static void s3fifo_hold(void *order, int32_t block)
{
    S3Fifo *fifo = order;
    s3fifo_pardon(fifo, block);
    fifo->is_held[block] = 1;
    fifo->num_held++;
}

static void s3fifo_release(void *order, int32_t block)
{
    S3Fifo *fifo = order;
    fifo->is_held[block] = 0;
    fifo->num_held--;
}

static int s3fifo_is_smalls_turn(const S3Fifo *fifo)
{
    int64_t num_small = fifo->length[S3_SMALL], num_main = fifo->length[S3_MAIN];
    if (!num_small)
        return 0;
    if (fifo->capacity)
        return num_main <= fifo->capacity - fifo->small_size;
    return !num_main || (double)num_small > SMALL_SHARE * (double)(num_small + num_main);
}

/* Take one step from the old end of a queue; returns the block if it is condemned now, else -1. */
static int32_t s3fifo_step(S3Fifo *fifo, int place)
{
    int32_t block = fifo->links[s3fifo_list(fifo, place)].next;
    int uses = fifo->uses[block], is_small = place == S3_SMALL;
    s3fifo_take(fifo, block);
    if (fifo->is_held[block])
        s3fifo_put(fifo, block, S3_MAIN, uses);
    else if (is_small ? uses > 1 : uses > 0)
        s3fifo_put(fifo, block, S3_MAIN, is_small ? 0 : uses - 1);
    else {
        s3fifo_put(fifo, block, is_small ? S3_CONDEMNED_SMALL : S3_CONDEMNED, 0);
        return block;
    }
    return -1;
}

static int64_t s3fifo_victims(void *order, int64_t n, int32_t *out)
{
    S3Fifo *fifo = order;
    int64_t num_free = s3fifo_free(fifo);
    n = n < num_free ? n : num_free;
    int64_t found = first_of(fifo->links, s3fifo_list(fifo, S3_CONDEMNED), n, out);
    fifo->has_evicted = 1;
    while (found < n) {
        int place = s3fifo_is_smalls_turn(fifo) ? S3_SMALL : S3_MAIN;
        int32_t block;
        do
            block = s3fifo_step(fifo, place);
        while (block < 0 && fifo->capacity && fifo->length[place]); /* the one that is told stays with a queue */
        if (block >= 0)
            out[found++] = block;
    }
    return found;
}

/* Of what left the small queue the name is kept for a while. */
static void s3fifo_leave(void *order, int32_t block)
{
    S3Fifo *fifo = order;
    s3fifo_take(fifo, block);
    if (fifo->place[block] != S3_CONDEMNED_SMALL)
        return;
    if (fifo->is_ghost[block])
        s3fifo_forget(fifo, block);
    append_block(fifo->names, fifo->first_list, block);
    fifo->is_ghost[block] = 1;
    fifo->num_names++;
    int64_t most = fifo->capacity ? (int64_t)((double)fifo->capacity * GHOST_SHARE) : fifo->most;
    while (fifo->num_names > most)
        s3fifo_forget(fifo, fifo->names[fifo->first_list].next);
}

static const PolicyKind S3FIFO = {
    .name = "s3fifo",
    .make = make_s3fifo,
    .add = s3fifo_add,
    .touch = s3fifo_touch,
    .hold = s3fifo_hold,
    .release = s3fifo_release,
    .victims = s3fifo_victims,
    .leave = s3fifo_leave,
    .discard = s3fifo_leave,
};
static const PolicyKind TOLD_S3FIFO = {
    .name = "s3fifo-paper",
    .make = make_told_s3fifo,
    .expect = s3fifo_expect,
    .add = s3fifo_add,
    .touch = s3fifo_touch,
    .victims = s3fifo_victims,
    .leave = s3fifo_leave,
    .discard = s3fifo_leave,
};

#endif
