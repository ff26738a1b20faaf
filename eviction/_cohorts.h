/* Cohorts in the order of what they are worth. The twin of cohorts.py.
 *
 * A cell is a class at an age: all its cohorts are worth the same. Two tournaments are played among cells: which has the
 * cohort that is worth least (of those with resident blocks), and which has the one that comes of the next age first. A
 * match is played again when a cell on its way has changed, so both winners are always known.
 *
 *     winners[1]                 the winner of all
 *     winners[2], winners[3]     of each half ...
 *     winners[LEAVES + cell]     cell + 1, or 0 if it does not take part
 */
#ifndef KVTIERS_COHORTS_H
#define KVTIERS_COHORTS_H

#include "_survival.h"

enum { NUM_CELLS = MAX_CLASSES * NUM_AGES, LEAVES = 1 << 16, NO_BLOCK = -1, GONE = 0, RESIDENT = 1 };

/* Blocks that one visit was the last to use, neighbours on its path and of one class. Cohort 0 stands for none. */
typedef struct {
    double time;
    uint64_t number;     /* younger cohorts have higher ones */
    int64_t weight;      /* of a block, as an observation; 0 where no visit has told of them */
    int32_t cell;
    int32_t next, prev;  /* in a list of the cell: of cohorts with resident blocks, or of those without; oldest first */
    int32_t first, last; /* resident blocks, root first */
    int32_t num_resident, num_live;
    int32_t above, deeper; /* cohorts of the same visit */
    int32_t size;        /* blocks of the path of the visit, 0 if none has told */
    uint32_t look;       /* the last one that named its blocks */
} Cohort;

typedef struct {
    int32_t first[2], last[2]; /* of cohorts whose blocks are all gone, and of the others */
    int32_t at;                /* the oldest of the others that a look has not come to yet */
    int32_t next_passed;       /* in a list of one look */
} Cell;

typedef struct {
    Survival survival;
    Cohort *cohorts;
    int32_t num_cohorts, room, free; /* free: the first of a list through `next` */
    Cell *cells;
    double *due; /* of a cell: when its oldest cohort comes of the next age */
    int32_t *least, *soonest;
    uint64_t last_number;
    uint32_t look;
    double now;
} Cohorts;

/* ---- tournaments ---- */

static int32_t less_worth(const Cohorts *all, int32_t one, int32_t other)
{
    if (!one || !other)
        return one + other;
    double left = all->survival.worth[one - 1], right = all->survival.worth[other - 1];
    if (left != right)
        return left < right ? one : other;
    return all->cohorts[all->cells[one - 1].at].number < all->cohorts[all->cells[other - 1].at].number ? one : other;
}

static int32_t sooner_due(const Cohorts *all, int32_t one, int32_t other)
{
    if (!one || !other)
        return one + other;
    return all->due[one - 1] <= all->due[other - 1] ? one : other;
}

static void play_worth(Cohorts *all, int32_t cell)
{
    int32_t *winners = all->least, entrant = all->cells[cell].at ? cell + 1 : 0;
    winners[LEAVES + cell] = entrant;
    for (int32_t match = (LEAVES + cell) >> 1; match; match >>= 1) {
        int32_t winner = less_worth(all, winners[2 * match], winners[2 * match + 1]);
        if (winner == winners[match] && winner != cell + 1)
            return;
        winners[match] = winner;
    }
}

static void play_due(Cohorts *all, int32_t cell)
{
    const Cell *this = &all->cells[cell];
    int32_t *winners = all->soonest, age = cell % NUM_AGES, gone = this->first[GONE], resident = this->first[RESIDENT];
    int takes_part = (gone || resident) && age < NUM_AGES - 1;
    if (takes_part) {
        double time = gone ? all->cohorts[gone].time : all->cohorts[resident].time;
        if (resident && all->cohorts[resident].time < time)
            time = all->cohorts[resident].time;
        all->due[cell] = time + all->survival.edges[age + 1];
    }
    winners[LEAVES + cell] = takes_part ? cell + 1 : 0;
    for (int32_t match = (LEAVES + cell) >> 1; match; match >>= 1) {
        int32_t winner = sooner_due(all, winners[2 * match], winners[2 * match + 1]);
        if (winner == winners[match] && winner != cell + 1)
            return;
        winners[match] = winner;
    }
}

/* ---- cells ---- */

static void enter_cell(Cohorts *all, int32_t cohort, int32_t number)
{
    Cohort *this = &all->cohorts[cohort];
    Cell *cell = &all->cells[number];
    int list = this->num_resident ? RESIDENT : GONE;
    int32_t before = cell->last[list];
    while (before && all->cohorts[before].number > this->number)
        before = all->cohorts[before].prev;
    this->cell = number;
    this->prev = before;
    this->next = before ? all->cohorts[before].next : cell->first[list];
    *(this->prev ? &all->cohorts[this->prev].next : &cell->first[list]) = cohort;
    *(this->next ? &all->cohorts[this->next].prev : &cell->last[list]) = cohort;
    if (!this->prev) {
        play_due(all, number);
        if (list == RESIDENT) {
            cell->at = cohort;
            play_worth(all, number);
        }
    }
}

static void leave_cell(Cohorts *all, int32_t cohort)
{
    Cohort *this = &all->cohorts[cohort];
    Cell *cell = &all->cells[this->cell];
    int list = this->num_resident ? RESIDENT : GONE;
    *(this->prev ? &all->cohorts[this->prev].next : &cell->first[list]) = this->next;
    *(this->next ? &all->cohorts[this->next].prev : &cell->last[list]) = this->prev;
    if (!this->prev) {
        play_due(all, this->cell);
        if (list == RESIDENT) {
            cell->at = cell->first[RESIDENT];
            play_worth(all, this->cell);
        }
    }
}

/* A cohort has so many resident blocks now. */
static void set_resident(Cohorts *all, int32_t cohort, int32_t num)
{
    Cohort *this = &all->cohorts[cohort];
    if (!num == !this->num_resident) {
        this->num_resident = num;
        return;
    }
    leave_cell(all, cohort);
    this->num_resident = num;
    enter_cell(all, cohort, this->cell);
}

/* Time goes on: cohorts come of the next age, and have waited as long. */
static void cohorts_advance(Cohorts *all, double now)
{
    all->now = now;
    for (int32_t winner; (winner = all->soonest[1]) && all->due[winner - 1] <= now;) {
        const Cell *cell = &all->cells[winner - 1];
        int32_t gone = cell->first[GONE], cohort = cell->first[RESIDENT];
        if (!cohort || (gone && all->cohorts[gone].time < all->cohorts[cohort].time))
            cohort = gone;
        Cohort *this = &all->cohorts[cohort];
        leave_cell(all, cohort);
        int32_t cls = this->cell / NUM_AGES, age = this->cell % NUM_AGES;
        while (age < NUM_AGES - 1 && this->time + all->survival.edges[age + 1] <= now)
            class_count(&all->survival, cls, ++age, 0, this->num_live * this->weight);
        enter_cell(all, cohort, cls * NUM_AGES + age);
    }
}

static void cohorts_update(Cohorts *all)
{
    int32_t first, end;
    survival_update(&all->survival, &first, &end);
    for (int32_t cell = first * NUM_AGES; cell < end * NUM_AGES; cell++)
        if (all->cells[cell].at)
            play_worth(all, cell);
}

/* ---- their lives ---- */

/* Have room for so many more; 0, or -1 if there is no memory. */
static int reserve_cohorts(Cohorts *all, int64_t num)
{
    int64_t wanted = all->num_cohorts + num;
    if (wanted <= all->room)
        return 0;
    wanted = wanted > 2 * (int64_t)all->room ? wanted : 2 * (int64_t)all->room;
    Cohort *grown = wanted < INT32_MAX ? realloc(all->cohorts, (size_t)wanted * sizeof *grown) : NULL;
    if (grown == NULL)
        return -1;
    all->cohorts = grown;
    all->room = (int32_t)wanted;
    return 0;
}

/* A new cohort without blocks; there is room for it. */
static int32_t new_cohort(Cohorts *all, int32_t cls, int64_t weight, int32_t size)
{
    int32_t cohort = all->free;
    if (cohort)
        all->free = all->cohorts[cohort].next;
    else
        cohort = all->num_cohorts++;
    all->cohorts[cohort] = (Cohort){.time = all->now, .number = ++all->last_number, .weight = weight, .first = NO_BLOCK,
                                    .last = NO_BLOCK, .size = size};
    enter_cell(all, cohort, cls * NUM_AGES);
    return cohort;
}

static void drop_cohort(Cohorts *all, int32_t cohort)
{
    Cohort *this = &all->cohorts[cohort];
    leave_cell(all, cohort);
    if (this->above)
        all->cohorts[this->above].deeper = this->deeper;
    if (this->deeper)
        all->cohorts[this->deeper].above = this->above;
    this->next = all->free;
    all->free = cohort;
}

static int make_cohorts(Cohorts *all)
{
    all->cells = calloc(NUM_CELLS, sizeof *all->cells);
    all->due = calloc(NUM_CELLS, sizeof *all->due);
    all->least = calloc(2 * LEAVES, sizeof *all->least);
    all->soonest = calloc(2 * LEAVES, sizeof *all->soonest);
    all->num_cohorts = 1;
    if (make_survival(&all->survival) < 0 || all->cells == NULL || all->due == NULL || all->least == NULL || all->soonest == NULL)
        return -1;
    return reserve_cohorts(all, 64);
}

static void free_cohorts(Cohorts *all)
{
    free_survival(&all->survival);
    free(all->cohorts);
    free(all->cells);
    free(all->due);
    free(all->least);
    free(all->soonest);
}

#endif
