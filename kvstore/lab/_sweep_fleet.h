/* Several stores, and how requests are spread over them: in turn, or as the cluster's router does.
 *
 * The router (kvstore/cluster/routing.py) chooses the replica that has least to compute: the prompt without what is stored
 * there, and what is queued. A queue is worked off at a stated rate; of equals the next in turn is taken.
 */
#ifndef KVTIERS_SWEEP_FLEET_H
#define KVTIERS_SWEEP_FLEET_H

#include "_sweep_store.h"

typedef struct {
    Store *stores;
    int num_stores, by_prefix;
    double *queued; /* blocks that each has still to compute */
    double blocks_per_s, looked_at;
    int64_t turn;
} Fleet;

static int choose(Fleet *fleet, const int32_t *path, int32_t length, double now)
{
    int turn = (int)(fleet->turn++ % fleet->num_stores), best = turn;
    if (!fleet->by_prefix || fleet->num_stores == 1)
        return turn;
    double least = 0, done = fleet->blocks_per_s * (now - fleet->looked_at);
    fleet->looked_at = now;
    for (int i = 0; i < fleet->num_stores; i++) {
        int number = (turn + i) % fleet->num_stores;
        fleet->queued[number] = fleet->queued[number] > done ? fleet->queued[number] - done : 0;
        expire(&fleet->stores[number], now);
        double work = fleet->queued[number] + (length - stored_prefix(&fleet->stores[number], path, length));
        if (i == 0 || work < least) {
            least = work;
            best = number;
        }
    }
    fleet->queued[best] = least;
    return best;
}

static void fleet_serve(Fleet *fleet, const int32_t *path, int32_t length, Told told, double now, int32_t *hits)
{
    serve(&fleet->stores[choose(fleet, path, length, now)], path, length, told, now, hits);
}

/* Give back what the policies took beside the memory of the play. */
static void free_orders(Fleet *fleet)
{
    for (int i = 0; fleet->stores != NULL && i < fleet->num_stores; i++)
        for (int number = 0; number < fleet->stores[i].num_tiers; number++) {
            Tier *tier = &fleet->stores[i].tiers[number];
            if (tier->order != NULL && tier->kind->free != NULL)
                tier->kind->free(tier->order);
        }
}

#endif
