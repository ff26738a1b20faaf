/* ARC: two recency lists, of blocks used once and of blocks used again, and what left each tells how to share the room.
 *
 * Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003.
 *
 *     [ once ] [ again ]      held, oldest first; `target` of the room is meant for `once`
 *     [ once_left ] [ again_left ]   names only
 */
#ifndef KVTIERS_SWEEP_ARC_H
#define KVTIERS_SWEEP_ARC_H

#include "_sweep_policy.h"

enum { ARC_ONCE, ARC_AGAIN, ARC_ONCE_LEFT, ARC_AGAIN_LEFT, ARC_LISTS, ARC_NOWHERE = ARC_LISTS };

typedef struct {
    Link *links;
    uint8_t *place;
    int64_t length[ARC_LISTS];
    int64_t capacity;
    double target;
    int32_t first_list;
    int is_from_again; /* the block that comes had left `again` */
} Arc;

static void *make_arc(Memory *memory, int32_t num_blocks, int64_t capacity)
{
    Arc *arc = new_array(memory, 1, sizeof *arc);
    if (arc != NULL) {
        arc->links = new_links(memory, num_blocks, ARC_LISTS);
        arc->place = new_array(memory, (size_t)num_blocks, 1);
        if (arc->place != NULL)
            memset(arc->place, ARC_NOWHERE, (size_t)num_blocks);
        arc->capacity = capacity;
        arc->first_list = num_blocks;
    }
    return arc;
}

static void arc_take(Arc *arc, int32_t block)
{
    int place = arc->place[block];
    if (place != ARC_NOWHERE) {
        unlink_block(arc->links, block);
        arc->length[place]--;
        arc->place[block] = ARC_NOWHERE;
    }
}

static void arc_put(Arc *arc, int32_t block, int place)
{
    arc_take(arc, block);
    append_block(arc->links, arc->first_list + place, block);
    arc->length[place]++;
    arc->place[block] = (uint8_t)place;
}

static void arc_forget_oldest(Arc *arc, int place) { arc_take(arc, arc->links[arc->first_list + place].next); }

/* A name that is still known moves the target towards the list that it had left. */
static void arc_expect(void *order, int32_t block)
{
    Arc *arc = order;
    int64_t *length = arc->length;
    arc->is_from_again = arc->place[block] == ARC_AGAIN_LEFT;
    if (arc->place[block] == ARC_ONCE_LEFT) {
        double step = (double)length[ARC_AGAIN_LEFT] / (double)length[ARC_ONCE_LEFT];
        arc->target += step > 1 ? step : 1;
        if (arc->target > (double)arc->capacity)
            arc->target = (double)arc->capacity;
    } else if (arc->is_from_again) {
        double step = (double)length[ARC_ONCE_LEFT] / (double)length[ARC_AGAIN_LEFT];
        arc->target -= step > 1 ? step : 1;
        if (arc->target < 0)
            arc->target = 0;
    }
}

static int64_t arc_victims(void *order, int64_t n, int32_t *out)
{
    Arc *arc = order;
    int64_t found = 0, left = arc->length[ARC_ONCE];
    int32_t end_once = arc->first_list + ARC_ONCE, end_again = arc->first_list + ARC_AGAIN;
    int32_t once = arc->links[end_once].next, again = arc->links[end_again].next;
    while (found < n && (once != end_once || again != end_again)) {
        int is_over = (double)left > arc->target || (arc->is_from_again && (double)left == arc->target);
        if (once != end_once && (is_over || again == end_again)) {
            out[found++] = once;
            once = arc->links[once].next;
            left--;
        } else {
            out[found++] = again;
            again = arc->links[again].next;
        }
    }
    return found;
}

static void arc_leave(void *order, int32_t block)
{
    Arc *arc = order;
    arc_put(arc, block, arc->place[block] == ARC_ONCE ? ARC_ONCE_LEFT : ARC_AGAIN_LEFT);
}

static void arc_add(void *order, int32_t block, int is_hit)
{
    Arc *arc = order;
    int64_t *length = arc->length;
    arc_put(arc, block, arc->place[block] == ARC_NOWHERE && !is_hit ? ARC_ONCE : ARC_AGAIN);
    while (length[ARC_ONCE] + length[ARC_ONCE_LEFT] > arc->capacity && length[ARC_ONCE_LEFT])
        arc_forget_oldest(arc, ARC_ONCE_LEFT);
    while (length[ARC_ONCE] + length[ARC_AGAIN] + length[ARC_ONCE_LEFT] + length[ARC_AGAIN_LEFT] > 2 * arc->capacity &&
           length[ARC_AGAIN_LEFT])
        arc_forget_oldest(arc, ARC_AGAIN_LEFT);
    arc->is_from_again = 0;
}

static void arc_touch(void *order, int32_t block) { arc_put(order, block, ARC_AGAIN); }

static void arc_discard(void *order, int32_t block) { arc_take(order, block); }

static const PolicyKind ARC = {
    .name = "arc",
    .make = make_arc,
    .expect = arc_expect,
    .add = arc_add,
    .touch = arc_touch,
    .victims = arc_victims,
    .leave = arc_leave,
    .discard = arc_discard,
};

#endif
