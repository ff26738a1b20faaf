/* Visits: who used which blocks last, and what that says about their next use. The twin of visits.py, which explains it.
 *
 * Blocks are numbers from 0 up. A block that is remembered is in one list: of its cohort if it is resident, of ghosts if
 * not. Nothing here allocates but `reserve_*`, so a call that fails has changed nothing.
 */
#ifndef KVTIERS_VISITS_H
#define KVTIERS_VISITS_H

#include "_cohorts.h"
#include "_told.h"

enum {
    UPDATE_VISITS = 16,
    REQUEST_WEIGHT = 8,
    GHOSTS = 4,
    LEAST_GHOSTS = 4096,
    SHORT_BY = 2,
    MOST_COUNT = 63,
    NEW_PACE = 7,
    BRANCH_PACE = 6
};
/* Features of a class; their values follow. */
enum { USES = 500, LAST_TURN = 400, GOES_ON = 401, REASON = 100, PACE = 0, REPLY = 200 };

typedef struct {
    int32_t next, prev;
    int32_t cohort; /* 0: it is not remembered */
    int32_t depth;
    uint8_t count, is_resident;
} Known;

typedef struct {
    Cohorts cohorts;
    Known *blocks;
    int64_t num_blocks;
    int32_t oldest_ghost, newest_ghost, forgotten; /* forgotten: first of a list through `next`, for the caller */
    int64_t num_ghosts, num_resident, most_resident, num_visits;
    int64_t least_ghosts;
    double told_at; /* by the caller's clock */
} Visits;

/* ---- lists of blocks ---- */

static void unlink_known(Visits *visits, int32_t block)
{
    Known *this = &visits->blocks[block];
    Cohort *cohort = &visits->cohorts.cohorts[this->cohort];
    int32_t *first = this->is_resident ? &cohort->first : &visits->oldest_ghost;
    int32_t *last = this->is_resident ? &cohort->last : &visits->newest_ghost;
    *(this->prev != NO_BLOCK ? &visits->blocks[this->prev].next : first) = this->next;
    *(this->next != NO_BLOCK ? &visits->blocks[this->next].prev : last) = this->prev;
    visits->num_ghosts -= !this->is_resident;
}

/* Put a block into the list that it belongs to: by depth, or as the youngest ghost. */
static void link_known(Visits *visits, int32_t block)
{
    Known *this = &visits->blocks[block];
    Cohort *cohort = &visits->cohorts.cohorts[this->cohort];
    int32_t *first = this->is_resident ? &cohort->first : &visits->oldest_ghost;
    int32_t *last = this->is_resident ? &cohort->last : &visits->newest_ghost;
    int32_t before = *last;
    while (this->is_resident && before != NO_BLOCK && visits->blocks[before].depth > this->depth)
        before = visits->blocks[before].prev;
    this->prev = before;
    this->next = before != NO_BLOCK ? visits->blocks[before].next : *first;
    *(this->prev != NO_BLOCK ? &visits->blocks[this->prev].next : first) = block;
    *(this->next != NO_BLOCK ? &visits->blocks[this->next].prev : last) = block;
    visits->num_ghosts += !this->is_resident;
}

static void change_resident(Visits *visits, int32_t cohort, int32_t num)
{
    set_resident(&visits->cohorts, cohort, visits->cohorts.cohorts[cohort].num_resident + num);
}

/* Blocks are of a cohort no more. */
static void part(Visits *visits, int32_t cohort, int32_t num)
{
    Cohort *this = &visits->cohorts.cohorts[cohort];
    this->num_live -= num;
    if (!this->num_live)
        drop_cohort(&visits->cohorts, cohort);
}

static void forget(Visits *visits, int32_t block)
{
    Known *this = &visits->blocks[block];
    int32_t cohort = this->cohort;
    unlink_known(visits, block);
    if (this->is_resident)
        change_resident(visits, cohort, -1);
    this->cohort = 0;
    this->next = visits->forgotten;
    visits->forgotten = block;
    part(visits, cohort, 1);
}

/* ---- what comes and goes ---- */

/* Blocks, root first, became resident. Those that no visit has told of are the newest cohort of their own. */
static void visits_arrive(Visits *visits, const int32_t *path, int32_t length)
{
    int32_t fresh = 0;
    for (int32_t i = 0; i < length; i++) {
        Known *this = &visits->blocks[path[i]];
        if (this->is_resident)
            continue;
        if (this->cohort) {
            unlink_known(visits, path[i]);
        } else {
            if (!fresh)
                fresh = new_cohort(&visits->cohorts, 0, 0, 0);
            this->cohort = fresh;
            this->count = 0;
            this->depth = i;
            visits->cohorts.cohorts[fresh].num_live++;
        }
        this->is_resident = 1;
        link_known(visits, path[i]);
        change_resident(visits, this->cohort, 1);
        visits->num_resident++;
    }
    if (visits->num_resident > visits->most_resident)
        visits->most_resident = visits->num_resident;
}

/* Blocks are not resident any more. Of those that no visit has told of there is nothing to remember. */
static void visits_leave(Visits *visits, const int32_t *blocks, int32_t num)
{
    for (int32_t i = 0; i < num; i++) {
        Known *this = &visits->blocks[blocks[i]];
        if (!this->is_resident)
            continue;
        visits->num_resident--;
        if (!visits->cohorts.cohorts[this->cohort].size) {
            forget(visits, blocks[i]);
            this->is_resident = 0;
            continue;
        }
        unlink_known(visits, blocks[i]);
        change_resident(visits, this->cohort, -1);
        this->is_resident = 0;
        link_known(visits, blocks[i]);
    }
}

/* ---- a visit ---- */

static int rank_of(double value, const double *limits, int num_limits)
{
    int rank = 0;
    while (rank < num_limits && limits[rank] < value)
        rank++;
    return rank;
}

/* Leading blocks that are remembered: by halves, since who knows a block mostly knows all before it. */
static int32_t num_known(const Visits *visits, const int32_t *path, int32_t length)
{
    int32_t low = 0, high = length;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (visits->blocks[path[middle]].cohort)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The time, as cohorts count it, of a moment by the caller's clock: one that is set back stands still here. */
static double time_at(const Visits *visits, double now)
{
    double passed = now - visits->told_at;
    return visits->cohorts.now + (passed > 0 && visits->num_visits ? passed : 0);
}

/* The features of a visit at a time, but for the number of uses, which is the first of a class.
 *
 * known: leading blocks that are remembered; last: the last of them. */
static int find_features(const Visits *visits, int32_t last, int32_t known, Told told, double time, int32_t *features)
{
    static const double PACES_S[] = {5, 15, 45, 120, 400}, REPLIES[] = {16, 64, 160, 320, 640};
    int32_t pace = NEW_PACE;
    int num = 0;
    if (known) {
        const Cohort *before = &visits->cohorts.cohorts[visits->blocks[last].cohort];
        pace = BRANCH_PACE;
        if (before->size && known >= 2 && known >= before->size - SHORT_BY)
            pace = rank_of(time - before->time, PACES_S, 5);
    }
    if (told.last_turn != UNKNOWN)
        features[num++] = told.last_turn ? LAST_TURN : GOES_ON;
    if (told.reason != UNKNOWN)
        features[num++] = REASON + told.reason;
    features[num++] = PACE + pace;
    if (told.reply_tokens != UNKNOWN)
        features[num++] = REPLY + rank_of(told.reply_tokens, REPLIES, 5);
    return num;
}

/* The first feature of a class: of blocks that were used so often before. */
static int32_t feature_of_uses(int32_t count)
{
    static const double LIMITS[] = {1, 2, 4, 8, 32};
    return USES + rank_of(count < MOST_COUNT ? count + 1 : MOST_COUNT, LIMITS, 5);
}

/* Forget what left longest ago. */
static void trim(Visits *visits)
{
    int64_t most = GHOSTS * visits->most_resident;
    most = most > visits->least_ghosts ? most : visits->least_ghosts;
    while (visits->num_ghosts > most)
        forget(visits, visits->oldest_ghost);
}

/* Time goes on. */
static void visits_advance(Visits *visits, double now)
{
    double time = time_at(visits, now);
    visits->told_at = now;
    cohorts_advance(&visits->cohorts, time);
}

/* Book a request that has ended. There is room for a cohort for each of its blocks. */
static void visits_visit(Visits *visits, const int32_t *path, int32_t length, Told told, double now)
{
    Cohorts *all = &visits->cohorts;
    int32_t features[MAX_DEPTH], cohort = 0, cls = -1, known = num_known(visits, path, length);
    visits_advance(visits, now);
    int num_features = find_features(visits, known ? path[known - 1] : NO_BLOCK, known, told, all->now, features + 1) + 1;
    int64_t weight = (int64_t)(REQUEST_WEIGHT * ONE_OBSERVATION / (length > REQUEST_WEIGHT ? length : REQUEST_WEIGHT));
    for (int32_t i = 0; i < length;) {
        int32_t before = visits->blocks[path[i]].cohort, count = before ? visits->blocks[path[i]].count : 0;
        if (before && before == cohort) { /* a path that names a block twice */
            i++;
            continue;
        }
        features[0] = feature_of_uses(count);
        int32_t number = class_of(&all->survival, features, num_features);
        if (!cohort || number != cls) {
            int32_t above = cohort;
            cohort = new_cohort(all, number, weight, length);
            cls = number;
            if (above) {
                all->cohorts[above].deeper = cohort;
                all->cohorts[cohort].above = above;
            }
        }
        int32_t num = 0, num_resident = 0;
        for (; i < length; i++) { /* blocks of one cohort, used as often */
            Known *this = &visits->blocks[path[i]];
            if (this->cohort != before || (before && this->count != count))
                break;
            if (before)
                unlink_known(visits, path[i]);
            this->cohort = cohort;
            this->count = (uint8_t)(count < MOST_COUNT ? count + 1 : MOST_COUNT);
            this->depth = i;
            link_known(visits, path[i]);
            num_resident += this->is_resident;
            num++;
        }
        if (before) {
            const Cohort *old = &all->cohorts[before];
            class_count(&all->survival, old->cell / NUM_AGES, old->cell % NUM_AGES, num * old->weight, 0);
            change_resident(visits, before, -num_resident);
            part(visits, before, num);
        }
        class_count(&all->survival, cls, 0, 0, num * weight);
        all->cohorts[cohort].num_live += num;
        change_resident(visits, cohort, num_resident);
    }
    trim(visits);
    if (++visits->num_visits % UPDATE_VISITS == 0)
        cohorts_update(all);
}

/* ---- the worth ---- */

static int age_of(const Survival *survival, double seconds)
{
    int age = 0;
    while (age < NUM_AGES - 1 && survival->edges[age + 1] <= seconds)
        age++;
    return age;
}

/* What a block is worth at a time; one that is not remembered is worth what the least known kind is. */
static double visits_worth(const Visits *visits, int32_t block, double now)
{
    const Cohorts *all = &visits->cohorts;
    const Cohort *cohort = &all->cohorts[visits->blocks[block].cohort];
    if (!visits->blocks[block].cohort)
        return all->survival.worth[0];
    return worth_of(&all->survival, cohort->cell / NUM_AGES)[age_of(&all->survival, time_at(visits, now) - cohort->time)];
}

/* What a block will be worth when a visit with these features has used it. features: the first of them is set here. */
static double visits_prospect(const Visits *visits, int32_t block, int32_t *features, int num_features)
{
    const Known *this = &visits->blocks[block];
    features[0] = feature_of_uses(this->cohort ? this->count : 0);
    return worth_of(&visits->cohorts.survival, seen_class_of(&visits->cohorts.survival, features, num_features))[0];
}

/* ---- the order ---- */

/* Name the resident blocks of a cohort, tail first, until there are `num`. */
static int64_t name_blocks(const Visits *visits, const Cohort *cohort, int64_t num, int64_t found, int32_t *out)
{
    for (int32_t block = cohort->last; block != NO_BLOCK && found < num; block = visits->blocks[block].prev)
        out[found++] = block;
    return found;
}

/* Name up to `num` resident blocks, those that are worth least first; of one visit's cohorts the deepest first. */
static int64_t visits_victims(Visits *visits, int64_t num, int32_t *out)
{
    Cohorts *all = &visits->cohorts;
    int64_t found = 0;
    int32_t passed = 0; /* cells whose oldest cohort was named, a list */
    all->look++;
    for (int32_t winner; found < num && (winner = all->least[1]);) {
        Cell *cell = &all->cells[winner - 1];
        int32_t cohort = cell->at, deepest = cohort;
        while (all->cohorts[deepest].deeper)
            deepest = all->cohorts[deepest].deeper;
        for (int32_t at = deepest;; at = all->cohorts[at].above) {
            if (all->cohorts[at].look != all->look) {
                all->cohorts[at].look = all->look;
                found = name_blocks(visits, &all->cohorts[at], num, found, out);
            }
            if (at == cohort)
                break;
        }
        if (cohort == cell->first[RESIDENT]) {
            cell->next_passed = passed;
            passed = winner;
        }
        cell->at = all->cohorts[cohort].next;
        play_worth(all, winner - 1);
    }
    for (; passed; passed = all->cells[passed - 1].next_passed) {
        all->cells[passed - 1].at = all->cells[passed - 1].first[RESIDENT];
        play_worth(all, passed - 1);
    }
    return found;
}

/* ---- memory ---- */

static int reserve_blocks(Visits *visits, int64_t num)
{
    if (num <= visits->num_blocks)
        return 0;
    int64_t wanted = num > 2 * visits->num_blocks ? num : 2 * visits->num_blocks;
    Known *grown = wanted < INT32_MAX ? realloc(visits->blocks, (size_t)wanted * sizeof *grown) : NULL;
    if (grown == NULL)
        return -1;
    memset(grown + visits->num_blocks, 0, (size_t)(wanted - visits->num_blocks) * sizeof *grown);
    visits->blocks = grown;
    visits->num_blocks = wanted;
    return 0;
}

/* 0, or -1 if there is no memory; `free_visits` in either case. visits: all zeros. */
static int make_visits(Visits *visits)
{
    visits->oldest_ghost = visits->newest_ghost = visits->forgotten = NO_BLOCK;
    visits->least_ghosts = LEAST_GHOSTS;
    return make_cohorts(&visits->cohorts) < 0 || reserve_blocks(visits, 64) < 0 ? -1 : 0;
}

static void free_visits(Visits *visits)
{
    free_cohorts(&visits->cohorts);
    free(visits->blocks);
}

#endif
