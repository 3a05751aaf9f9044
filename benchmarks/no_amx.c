/* Refuses a process the use of AMX tiles, for machines that announce them and then crash llama.cpp's AMX code:

       gcc -shared -fPIC -O2 -o no_amx.so no_amx.c
       LD_PRELOAD=$PWD/no_amx.so python ... */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>

static const long get_permission = 0x1022, ask_permission = 0x1023; /* of arch_prctl, for CPU features */

long syscall(long number, ...) {
    static long (*real)(long, ...);
    long a[6];
    va_list arguments;
    va_start(arguments, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(arguments, long);
    va_end(arguments);
    if (number == SYS_arch_prctl && (a[0] == get_permission || a[0] == ask_permission)) {
        errno = EINVAL;
        return -1;
    }
    if (!real) real = dlsym(RTLD_NEXT, "syscall");
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
