/* Checks of pyx/team.h without OpenMP: the region is opened by threads of its own. test_team.py
 * builds and runs it. */
#include "team.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            printf("line %d: not so: %s\n", __LINE__, #condition);               \
            exit(1);                                                             \
        }                                                                        \
    } while (0)

enum { OWNERS = 4, JOBS = 400, TASKS = 40, THREADS = 6 };

static void *serve(void *worker) {
    dfp_serve((int)(intptr_t)worker);
    return NULL;
}

static void region(int first, int count) {
    pthread_t thread;
    for (int i = first; i < first + count; i++)
        CHECK(!pthread_create(&thread, NULL, serve, (void *)(intptr_t)i));
}

static int at_work;

/* Tasks write plain memory, each its own, and each thread its own: nothing but the team orders
 * them, which ThreadSanitizer looks at. */
typedef struct {
    int64_t n, threads, limit;
    int64_t done[TASKS], by[THREADS], busy[THREADS];
} counting;

static void count_task(void *work, int64_t i, int thread) {
    counting *c = work;
    CHECK(0 <= i && i < c->n && 0 <= thread && thread < c->threads && (thread < c->n));
    CHECK(!__atomic_fetch_add(&c->busy[thread], 1, __ATOMIC_RELAXED));
    CHECK(__atomic_add_fetch(&at_work, 1, __ATOMIC_RELAXED) <= c->limit + OWNERS - 1);
    c->done[i]++;
    c->by[thread]++;
    for (volatile int spin = 0; spin < 2000; spin++);
    __atomic_fetch_sub(&at_work, 1, __ATOMIC_RELAXED);
    __atomic_fetch_sub(&c->busy[thread], 1, __ATOMIC_RELAXED);
}

static void count(int64_t n, int threads, int limit) {
    counting c = {.n = n, .threads = threads, .limit = limit};
    int64_t sum = 0;
    dfp_run(count_task, &c, n, threads, limit);
    for (int64_t i = 0; i < TASKS; i++) CHECK(c.done[i] == (i < n));
    for (int i = 0; i < THREADS; i++) sum += c.by[i];
    CHECK(sum == n);
}

static void *own(void *seed) {
    unsigned random = (unsigned)(intptr_t)seed;
    for (int i = 0; i < JOBS; i++) {
        const int64_t n = rand_r(&random) % (TASKS + 1);
        count(n, 1 + rand_r(&random) % THREADS, THREADS);
        if (rand_r(&random) % 20 == 0) usleep(300); /* longer than workers watch */
    }
    return NULL;
}

static void check_owners_at_once(void) {
    pthread_t owners[OWNERS];
    for (intptr_t i = 0; i < OWNERS; i++)
        CHECK(!pthread_create(&owners[i], NULL, own, (void *)(i + 1)));
    for (int i = 0; i < OWNERS; i++) pthread_join(owners[i], NULL);
    pthread_mutex_lock(&dfp_team.lock);
    CHECK(dfp_team.running == 0 && dfp_team.jobs == NULL);
    pthread_mutex_unlock(&dfp_team.lock);
}

/* Ends when all tasks of the job have begun. */
static void meet_task(void *work, int64_t i, int thread) {
    int *begun = work;
    (void)i, (void)thread;
    __atomic_fetch_add(begun, 1, __ATOMIC_RELAXED);
    for (int64_t end = dfp_now() + 20000000000; __atomic_load_n(begun, __ATOMIC_RELAXED) < THREADS;)
        CHECK(dfp_now() < end);
}

static void check_all_come(void) {
    for (int i = 0; i < 20; i++) {
        int begun = 0;
        if (i % 2) usleep(20000); /* they sleep */
        dfp_run(meet_task, &begun, THREADS, THREADS, THREADS);
    }
}

static void check_nobody_spins(void) {
    struct timespec before, after;
    usleep(20000);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    usleep(200000);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    CHECK(after.tv_sec - before.tv_sec + 1e-9 * (after.tv_nsec - before.tv_nsec) < 0.02);
    pthread_mutex_lock(&dfp_team.lock);
    CHECK(dfp_team.waiting == 0);
    pthread_mutex_unlock(&dfp_team.lock);
}

static void check_a_forked_child(void) {
    int status;
    const pid_t child = fork();
    if (!child) {
        counting c = {.n = TASKS, .threads = 1, .limit = THREADS};
        dfp_run(count_task, &c, TASKS, THREADS, THREADS);
        _exit(c.by[0] != TASKS);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static void check_a_cpu_each(void) {
    cpu_set_t all, one, now;
    int cpu, first = -1, second = -1, other;
    CHECK(!sched_getaffinity(0, sizeof all, &all));
    for (int i = 0; i < CPU_SETSIZE && second < 0; i++)
        if (CPU_ISSET(i, &all)) *(first < 0 ? &first : &second) = i;
    if (second < 0) {
        printf("one CPU: not checked what takes two\n");
        return;
    }
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    CHECK(!sched_setaffinity(0, sizeof one, &one));
    CHECK(dfp_take_cpu(&cpu, -1) == first);             /* for who comes first, */
    CHECK(dfp_take_cpu(&other, -1) == -1);              /* but for nobody else, */
    CHECK(dfp_take_cpu(&cpu, first) == first);          /* and it stays theirs. */
    CHECK(!sched_setaffinity(0, sizeof all, &all));
    other = dfp_take_cpu(&other, -1);
    CHECK(other >= 0 && other != first);
    CHECK(!sched_getaffinity(0, sizeof now, &now) && CPU_EQUAL(&now, &all));
    memset(dfp_taken, 0, sizeof dfp_taken);
}

int main(void) {
    dfp_open_team(region);
    check_a_cpu_each();
    count(0, 3, 3);
    count(1, 3, 3);
    count(TASKS, 1, 1);
    CHECK(dfp_team.size == 1);          /* nobody was needed */
    count(TASKS, 2, 2);
    count(TASKS, 3, THREADS);           /* the team grows */
    CHECK(dfp_team.size == THREADS);
    check_all_come();
    check_owners_at_once();
    check_all_come();
    check_nobody_spins();
    check_a_forked_child();
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) CHECK(!dfp_taken[cpu]);
    printf("ok\n");
    return 0;
}
