/* What `bench spawn` starts under every launcher. Its first act is to read the clock, its second to tell the time: so the
   moment of the exec is seen in the same way whoever executed it. Linked statically, so that no loader comes before it. */
#include <stdint.h>
#include <time.h>
#include <unistd.h>

int main(void) {
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0) {
        return 1;
    }
    uint64_t nanoseconds = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    return write(STDOUT_FILENO, &nanoseconds, sizeof nanoseconds) == sizeof nanoseconds ? 0 : 1;
}
