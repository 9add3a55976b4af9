#include "hosted.h"

#include <chrono>

#include "request.h"

namespace {
/// How often Triton is asked for cancellations.
constexpr std::chrono::milliseconds PERIOD(20);
/// How often metrics are brought to Triton's port, in these periods.
constexpr int METRICS = 10;
} // namespace

Hosted::Hosted(Settings settings, const std::shared_ptr<const Families> &families)
    : settings_(std::move(settings)), families_(families), served_(Served::open(settings_, families)),
      in_flight_(families->in_flight(), "model", settings_.name), watcher_([this] { watch(); }) {}

Hosted::~Hosted() {
    {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return open_ == 0; });
        ends_ = true;
        changed_.notify_all();
    }
    watcher_.join();
}

void Hosted::enter(Request &request) {
    const std::lock_guard<std::mutex> lock(mutex_);
    asked_.insert(&request);
    open_++;
    in_flight_.set(static_cast<double>(asked_.size()));
    if (asked_.size() == 1) changed_.notify_all();
}

void Hosted::forget(Request &request) {
    const std::lock_guard<std::mutex> lock(mutex_);
    asked_.erase(&request);
    in_flight_.set(static_cast<double>(asked_.size()));
}

void Hosted::leave() {
    // Notified under the lock: without it, the object could be gone before the notification.
    const std::lock_guard<std::mutex> lock(mutex_);
    open_--;
    if (open_ == 0) changed_.notify_all();
}

void Hosted::watch() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (int period = 0; !ends_; period++) {
        for (Request *request : asked_) request->cancel_if_told();
        const bool is_idle = asked_.empty();
        bool is_at_rest = true;
        if (is_idle || period % METRICS == 0) {
            lock.unlock();
            try {
                is_at_rest = served_->update_metrics();
            } catch (...) {
                // An engine that fails says so to its requests.
            }
            lock.lock();
        }
        const auto is_awake = [&] { return ends_ || !asked_.empty(); };
        if (!is_idle) changed_.wait_for(lock, PERIOD);
        else if (is_at_rest) changed_.wait(lock, is_awake);
        // The engine counts a row as in flight until after its request has ended.
        else changed_.wait_for(lock, METRICS * PERIOD, is_awake);
    }
}
