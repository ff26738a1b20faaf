/* Outlook: what is least likely to be used again leaves first; the core is that of the policy itself. */
#ifndef KVTIERS_SWEEP_OUTLOOK_H
#define KVTIERS_SWEEP_OUTLOOK_H

#include "../../eviction/_visits.h"
#include "_sweep_policy.h"

typedef struct {
    Visits visits;
    Memory *memory; /* of the play, which ends when it has failed */
} Outlook;

static void *make_outlook(Memory *memory, int32_t num_blocks, int64_t capacity)
{
    (void)capacity;
    Outlook *outlook = new_array(memory, 1, sizeof *outlook);
    if (outlook != NULL) {
        outlook->memory = memory;
        if (make_visits(&outlook->visits) < 0 || reserve_blocks(&outlook->visits, num_blocks) < 0)
            memory->has_failed = 1;
    }
    return outlook;
}

static void free_outlook(void *order)
{
    Outlook *outlook = order;
    free_visits(&outlook->visits);
}

static int has_room(Outlook *outlook, int64_t num_cohorts)
{
    if (reserve_cohorts(&outlook->visits.cohorts, num_cohorts) < 0)
        outlook->memory->has_failed = 1;
    return !outlook->memory->has_failed;
}

static void outlook_add(void *order, int32_t block, int is_hit)
{
    Outlook *outlook = order;
    (void)is_hit;
    if (has_room(outlook, 1))
        visits_arrive(&outlook->visits, &block, 1);
}

static void outlook_leave(void *order, int32_t block)
{
    Outlook *outlook = order;
    visits_leave(&outlook->visits, &block, 1);
    outlook->visits.forgotten = NO_BLOCK;
}

static int64_t outlook_victims(void *order, int64_t n, int32_t *out)
{
    Outlook *outlook = order;
    return visits_victims(&outlook->visits, n, out);
}

static void outlook_used(void *order, double now)
{
    Outlook *outlook = order;
    visits_advance(&outlook->visits, now);
}

/* What is known before the end of a request is how it continues others, and perhaps that it is the last turn. */
static int64_t outlook_admits(void *order, const int32_t *path, int32_t length, Told told, const int32_t *wanted, int64_t num,
                              const int32_t *victims, int64_t num_victims, double now)
{
    const Visits *visits = &((Outlook *)order)->visits;
    int32_t features[MAX_DEPTH], known = num_known(visits, path, length);
    told.reason = told.reply_tokens = UNKNOWN;
    int num_features = find_features(visits, known ? path[known - 1] : NO_BLOCK, known, told, time_at(visits, now), features + 1) + 1;
    for (int64_t i = 0; i < num && i < num_victims; i++)
        if (visits_prospect(visits, wanted[i], features, num_features) < visits_worth(visits, victims[i], now))
            return i;
    return num;
}

static void outlook_ended(void *order, const int32_t *path, int32_t length, Told told, double now)
{
    Outlook *outlook = order;
    if (has_room(outlook, length))
        visits_visit(&outlook->visits, path, length, told, now);
    outlook->visits.forgotten = NO_BLOCK;
}

static const PolicyKind OUTLOOK = {
    .name = "outlook",
    .make = make_outlook,
    .free = free_outlook,
    .add = outlook_add,
    .victims = outlook_victims,
    .leave = outlook_leave,
    .discard = outlook_leave,
    .used = outlook_used,
    .admits = outlook_admits,
    .ended = outlook_ended,
};

#endif
