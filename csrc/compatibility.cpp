// What a newer C++ or C library than that of GCC 8 and glibc 2.28 would bring at run time, so that the library loads
// where those are installed (manylinux_2_28) wherever it was built.
#include <new>
#include <sstream>

// GLIBCXX_3.4.26 and 3.4.29: what the headers promise to be in libstdc++
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

#if _GLIBCXX_RELEASE >= 11
// GLIBCXX_3.4.29
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }
#endif

#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
// GLIBC_2.32: reference counts are atomic always
extern "C" {
char __libc_single_threaded = 0;
}
#endif
