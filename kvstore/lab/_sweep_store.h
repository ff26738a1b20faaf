/* A store: host memory and the tiers below it, as the planner runs them (kvstore/plan), without bytes.
 *
 * A request hits its longest prefix that is stored anywhere. What lies below host memory is brought there, what is not
 * stored is saved there, and then its path is touched in every tier, tail first. Room is made by the tier's policy, and
 * never by a block of the request's own path: where a prompt does not fit, its head stays.
 *
 *   inclusive   what is whole in host memory is copied to every tier below that admits it
 *   exclusive   a block that host memory evicts goes to the tier below, and leaves it when it is hit
 */
#ifndef KVTIERS_SWEEP_STORE_H
#define KVTIERS_SWEEP_STORE_H

#include "_sweep_tier.h"

enum { MAX_TIERS = 3, HOST = 0 };
/* Flags of a block. The catalog knows it as long as something of it, or of what continues it, is stored; where a request
 * has ended since it came to be known, another one that brings it again counts as a use. */
enum { USED_AGAIN = 1 /* hit since it was stored */, KNOWN = 2, ENDED = 4 };
#define BUDGET_S 3600.0               /* what is not written of a budget may be made up for this long */
#define DAY_S 86400.0

typedef struct {
    uint32_t turn;  /* of the last request on whose path it was */
    uint8_t places; /* bits of tiers that have it */
    uint8_t fresh;  /* bits of tiers that the request of `turn` brought it to */
    uint8_t flags;
} Spot;

typedef struct {
    int num_tiers, is_exclusive, on_second_use;
    int budget_tier;       /* the one whose writes are limited, 0 for none */
    double writes_per_day, writes_left, counted_at;
    Tier tiers[MAX_TIERS];
    Spot *spots;
    int32_t *victims, *wanted;
    int32_t *parents, *num_children; /* of known blocks; NULL where no policy minds what is known */
    uint32_t turn;
} Store;

static void make_store(Store *store, Memory *memory, const PolicyKind *kind, int32_t num_blocks, int32_t longest, double ttl_s,
                       int num_tiers, const int64_t *capacities)
{
    store->num_tiers = num_tiers;
    for (int number = 0; number < num_tiers; number++)
        make_tier(&store->tiers[number], memory, kind, num_blocks, capacities[number], ttl_s, number);
    store->spots = new_array(memory, (size_t)num_blocks, sizeof(Spot));
    store->victims = new_array(memory, (size_t)num_blocks, sizeof(int32_t));
    store->wanted = new_array(memory, (size_t)longest, sizeof(int32_t));
    if (kind->hold != NULL) {
        store->parents = new_array(memory, (size_t)num_blocks, sizeof(int32_t));
        store->num_children = new_array(memory, (size_t)num_blocks, sizeof(int32_t));
    }
}

static int32_t stored_prefix(const Store *store, const int32_t *path, int32_t length)
{
    int32_t known = 0;
    while (known < length && store->spots[path[known]].places)
        known++;
    return known;
}

/* ---- what leaves ---- */

static void demote(Store *store, int number, int32_t block, double now);

/* Forget blocks that are nowhere, from one upwards; never those on the path of the request that is being served. */
static void prune(Store *store, int32_t block)
{
    while (block >= 0 && (store->spots[block].flags & KNOWN) && !store->spots[block].places && !store->num_children[block] &&
           store->spots[block].turn != store->turn) {
        store->spots[block].flags = 0;
        block = store->parents[block];
        if (block >= 0)
            store->num_children[block]--;
    }
}

/* A request ends: its path is known, as far as anything of it is stored. */
static void note_end(Store *store, const int32_t *path, int32_t length)
{
    for (int32_t i = 0; i < length; i++) {
        Spot *spot = &store->spots[path[i]];
        if (!(spot->flags & KNOWN)) {
            store->parents[path[i]] = i ? path[i - 1] : -1;
            if (i)
                store->num_children[path[i - 1]]++;
        }
        spot->flags |= KNOWN | ENDED;
    }
    store->turn++; /* the path is no longer safe */
    prune(store, length ? path[length - 1] : -1);
}

static void forget_copy(Store *store, Tier *tier, int32_t block)
{
    Spot *spot = &store->spots[block];
    spot->places &= (uint8_t)~tier->bit;
    if (!spot->places) {
        spot->flags &= (uint8_t)~USED_AGAIN;
        if (store->num_children != NULL)
            prune(store, block);
    }
}

/* Drop what is past its deadline. */
static void expire(Store *store, double now)
{
    for (int number = 0; number < store->num_tiers; number++) {
        Tier *tier = &store->tiers[number];
        for (int32_t block; (block = next_expired(tier, now)) >= 0;) {
            tier_discard(tier, block);
            forget_copy(store, tier, block);
        }
    }
}

/* Name up to `n` blocks that are not on the path. Where some of the first are, the policy is asked for twice as many, as
 * the planner does: naming victims may change an order. */
static int64_t name_victims(Store *store, int number, int64_t n)
{
    Tier *tier = &store->tiers[number];
    int64_t ask = n, found, num_free;
    do {
        if (ask > tier->used)
            ask = tier->used + 1;
        found = tier->kind->victims(tier->order, ask, store->victims);
        num_free = 0;
        for (int64_t i = 0; i < found && num_free < n; i++)
            if (store->spots[store->victims[i]].turn != store->turn)
                store->victims[num_free++] = store->victims[i];
    } while (num_free < n && found == ask && (ask *= 2));
    return num_free;
}

/* Evict up to `n` blocks that are not on the path. */
static void evict(Store *store, int number, int64_t n, double now)
{
    Tier *tier = &store->tiers[number];
    int64_t num_named = name_victims(store, number, n);
    int32_t *named = store->victims;
    for (int64_t i = 0; i < num_named; i++) {
        int32_t block = named[i];
        tier_leave(tier, block);
        if (store->is_exclusive && number + 1 < store->num_tiers) {
            store->spots[block].places &= (uint8_t)~tier->bit;
            store->victims = named + num_named; /* of the tier below, behind these; together they are not more than all */
            demote(store, number + 1, block, now);
            store->victims = named;
            if (!store->spots[block].places)
                forget_copy(store, tier, block);
        } else
            forget_copy(store, tier, block);
    }
}

/* Free slots for up to `n` blocks; returns for how many there are some. */
static int64_t make_room(Store *store, int number, int64_t n, double now)
{
    Tier *tier = &store->tiers[number];
    int64_t missing = n - (tier->capacity - tier->used);
    if (missing > 0)
        evict(store, number, missing, now);
    int64_t room = tier->capacity - tier->used;
    return n < room ? n : room;
}

/* ---- what goes down ---- */

static int may_write(Store *store, int number, double now)
{
    if (number != store->budget_tier)
        return 1;
    double most = store->writes_per_day * BUDGET_S / DAY_S;
    store->writes_left += store->writes_per_day * (now - store->counted_at) / DAY_S;
    store->counted_at = now;
    if (store->writes_left > most)
        store->writes_left = most;
    if (store->writes_left < 1)
        return 0;
    store->writes_left -= 1;
    return 1;
}

static void put(Store *store, int number, int32_t block, int is_hit, double now)
{
    Spot *spot = &store->spots[block];
    spot->places |= store->tiers[number].bit;
    spot->fresh |= store->tiers[number].bit;
    tier_add(&store->tiers[number], block, is_hit, now);
}

/* A block that the tier above has evicted comes to this one, if it admits it. */
static void demote(Store *store, int number, int32_t block, double now)
{
    Tier *tier = &store->tiers[number];
    if (store->on_second_use && !(store->spots[block].flags & USED_AGAIN))
        return;
    if (tier->kind->expect != NULL)
        tier->kind->expect(tier->order, block);
    if (make_room(store, number, 1, now) && may_write(store, number, now)) {
        put(store, number, block, 0, now);
        if (tier->by_use != NULL) /* a move is no use */
            set_used_at(tier, block, store->tiers[number - 1].used_at[block]);
    }
}

/* Copy blocks of the path that are in host memory to a tier that should have them, tail first. */
static void copy_down(Store *store, int number, const int32_t *path, int32_t length, double now)
{
    Tier *tier = &store->tiers[number];
    int32_t num_wanted = 0;
    for (int32_t i = 0; i < length; i++) {
        const Spot *spot = &store->spots[path[i]];
        int is_admitted = !store->on_second_use || (spot->flags & USED_AGAIN);
        if ((spot->places & (1 | tier->bit)) == 1 && is_admitted && may_write(store, number, now))
            store->wanted[num_wanted++] = path[i];
    }
    for (int32_t i = num_wanted - 1; tier->kind->expect != NULL && i >= 0; i--)
        tier->kind->expect(tier->order, store->wanted[i]);
    for (int64_t i = make_room(store, number, num_wanted, now) - 1; i >= 0; i--)
        put(store, number, store->wanted[i], 0, now);
}

/* ---- a request ---- */

/* Of the blocks that host memory wants, take those for which it can make room out of the tiers below: theirs is then for
 * what it evicts. num_held: blocks of the same path that stay where they are, in host memory. */
static void lift(Store *store, int32_t num_wanted, int32_t num_held)
{
    int64_t room = store->tiers[HOST].capacity - num_held;
    for (int32_t i = 0; i < num_wanted && i < room; i++) {
        int32_t block = store->wanted[i];
        for (int number = 1; number < store->num_tiers; number++)
            if (store->spots[block].places & store->tiers[number].bit) {
                tier_discard(&store->tiers[number], block);
                store->spots[block].places &= (uint8_t)~store->tiers[number].bit;
            }
    }
}

/* How many of the blocks that host memory wants are worth coming: those for which it has room, and where nothing is below
 * it those that are worth what they push out. */
static int64_t num_worthy(Store *store, const int32_t *path, int32_t length, int64_t num_wanted, Told told, double now)
{
    const Tier *host = &store->tiers[HOST];
    int64_t room = host->capacity - host->used, missing = num_wanted - room;
    if (missing <= 0 || host->kind->admits == NULL || store->num_tiers > 1)
        return num_wanted;
    int64_t num_victims = name_victims(store, HOST, missing);
    return room + host->kind->admits(host->order, path, length, told, store->wanted + room, missing, store->victims, num_victims, now);
}

/* Take the blocks of path[first, end) that host memory lacks into it; those for which there is no room are the last.
 * is_hit: a tier below has them. */
static void bring(Store *store, const int32_t *path, int32_t first, int32_t end, int is_hit, Told told, double now)
{
    Tier *host = &store->tiers[HOST];
    int32_t num_wanted = 0;
    for (int32_t i = first; i < end; i++)
        if (!(store->spots[path[i]].places & host->bit))
            store->wanted[num_wanted++] = path[i];
    for (int32_t i = num_wanted - 1; host->kind->expect != NULL && i >= 0; i--)
        host->kind->expect(host->order, store->wanted[i]);
    if (is_hit && store->is_exclusive)
        lift(store, num_wanted, end - first - num_wanted);
    int64_t room = make_room(store, HOST, is_hit ? num_wanted : num_worthy(store, path, end, num_wanted, told, now), now);
    for (int64_t i = room - 1; i >= 0; i--)
        if (!(store->spots[store->wanted[i]].places & host->bit)) /* a path that names a block twice */
            put(store, HOST, store->wanted[i], is_hit, now);
}

/* Serve one request. hits: for each tier, how many blocks of the stored prefix it gives, of those that have a block the
 * nearest. */
static void serve(Store *store, const int32_t *path, int32_t length, Told told, double now, int32_t *hits)
{
    expire(store, now);
    store->turn++;
    int32_t known = stored_prefix(store, path, length);
    for (int32_t i = 0; i < known; i++) {
        Spot *spot = &store->spots[path[i]];
        hits[__builtin_ctz(spot->places)]++;
        spot->turn = store->turn;
        spot->fresh = 0;
        spot->flags |= USED_AGAIN;
    }
    const Tier *host = &store->tiers[HOST];
    if (host->kind->used != NULL)
        host->kind->used(host->order, now);
    for (int32_t i = 0; host->kind->hold != NULL && i < known; i++)
        if (store->spots[path[i]].places & host->bit)
            host->kind->hold(host->order, path[i]);
    if (known > hits[HOST])
        bring(store, path, 0, known, 1, told, now);
    for (int32_t i = known - 1; host->kind->release != NULL && i >= 0; i--)
        if ((store->spots[path[i]].places & host->bit) && !(store->spots[path[i]].fresh & host->bit))
            host->kind->release(host->order, path[i]);
    for (int32_t i = known; i < length; i++) {
        store->spots[path[i]].turn = store->turn;
        store->spots[path[i]].fresh = 0;
    }
    if (known < length)
        bring(store, path, known, length, 0, told, now);
    for (int number = 1; number < store->num_tiers && !store->is_exclusive; number++)
        copy_down(store, number, path, length, now);
    int32_t num_ended = length; /* the blocks of the path that an earlier request has ended with */
    if (store->num_children != NULL)
        for (num_ended = 0; num_ended < length && (store->spots[path[num_ended]].flags & ENDED);)
            num_ended++;
    for (int number = 0; number < store->num_tiers; number++) {
        Tier *tier = &store->tiers[number];
        for (int32_t i = length - 1; i >= 0; i--) {
            const Spot *spot = &store->spots[path[i]];
            int is_new = store->num_children != NULL ? i >= num_ended : (spot->fresh & tier->bit) && !tier->kind->touches_new;
            if ((spot->places & tier->bit) && !is_new)
                tier_touch(tier, path[i], now);
        }
    }
    for (int number = 0; number < store->num_tiers; number++)
        if (store->tiers[number].kind->ended != NULL)
            store->tiers[number].kind->ended(store->tiers[number].order, path, length, told, now);
    if (store->num_children != NULL)
        note_end(store, path, length);
}

#endif
