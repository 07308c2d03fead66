#include "parallel.hpp"

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <exception>
#include <list>
#include <mutex>
#include <thread>

namespace dqe::cpu {
namespace {

struct Job {
    void (*work)(void* context, int thread);
    void* context;
    int helpers;
    int begun = 0, running = 0;
    std::condition_variable done{};
};

// Never destroyed: at the end of the process its threads sleep on.
class Pool {
  public:
    void run(Job& job) {
        // With others at work, this caller takes its share of the processors: more threads than these would only take turns.
        const int callers = ++callers_;
        job.helpers = (job.helpers + 1) / callers - 1;
        help_and_work(job);
        --callers_;
    }

  private:
    void help_and_work(Job& job) {
        if (job.helpers < 1) return job.work(job.context, 0);
        std::list<Job*> own;  // a node, so that no memory is asked for under the lock
        try {
            own.push_back(&job);
        } catch (const std::exception&) {  // bad_alloc
            return job.work(job.context, 0);
        }
        const auto node = own.begin();
        {
            const std::lock_guard lock(mutex_);
            while (threads_ < job.helpers && start_thread()) ++threads_;
            waiting_.splice(waiting_.end(), own);
        }
        for (int i = 0; i < job.helpers; ++i) wanted_.notify_one();
        job.work(job.context, 0);
        std::unique_lock lock(mutex_);
        // All parts are taken: who has not begun is not needed.
        if (job.begun < job.helpers) waiting_.erase(node);
        job.done.wait(lock, [&] { return job.running == 0; });
    }

    // Whether the system grants one more; if not, those there are do all the work.
    bool start_thread() {
        sigset_t all, before;  // signals are for the threads of whoever called
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        bool started = true;
        try {
            std::thread([this] { serve(); }).detach();
        } catch (const std::exception&) {  // system_error, bad_alloc
            started = false;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return started;
    }

    void serve() {
        std::unique_lock lock(mutex_);
        while (true) {
            wanted_.wait(lock, [&] { return !waiting_.empty(); });
            Job& job = *waiting_.front();
            const int thread = ++job.begun;
            ++job.running;
            if (job.begun == job.helpers) waiting_.pop_front();
            lock.unlock();
            job.work(job.context, thread);
            lock.lock();
            if (--job.running == 0) job.done.notify_one();  // under the lock: the job is gone once its caller has seen this
        }
    }

    std::mutex mutex_;
    std::condition_variable wanted_;
    std::list<Job*> waiting_;  // jobs that want more helpers, first come first
    int threads_ = 0;
    std::atomic<int> callers_{0};
};

std::atomic<Pool*> pool{nullptr};

// In a child there are none of the threads, and a lock may be held by one of them for ever: it begins anew.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });

Pool& the_pool() {
    if (Pool* made = pool.load()) return *made;
    auto* const made = new Pool;
    Pool* other = nullptr;
    if (pool.compare_exchange_strong(other, made)) return *made;
    delete made;  // another thread was first
    return *other;
}

}  // namespace

void with_helpers(int helpers, void (*work)(void* context, int thread), void* context) {
    if (helpers < 1) return work(context, 0);
    Job job{.work = work, .context = context, .helpers = helpers};
    the_pool().run(job);
}

}  // namespace dqe::cpu
