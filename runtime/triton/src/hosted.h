// A model as Triton hosts it: its settings, what it serves, and its requests in flight.
#ifndef T5GEMMA_TRITON_HOSTED_H
#define T5GEMMA_TRITON_HOSTED_H

#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "served.h"

class Request;

class Hosted {
public:
    Hosted(Settings settings, const std::shared_ptr<const Families> &families);
    /// Waits until all requests have been given back to Triton.
    ~Hosted();
    Hosted(const Hosted &) = delete;
    Hosted &operator=(const Hosted &) = delete;

    const Settings &settings() const { return settings_; }
    /// Takes the configuration after it was completed.
    void completed(const Json &config) { settings_.complete(config); }
    Served &served() const { return *served_; }

    /// A request begins: it is asked about from now on.
    void enter(Request &request);
    /// It is about to end: it is not asked about any more.
    void forget(Request &request);
    /// Triton has it back. The caller touches nothing of this object afterwards.
    void leave();

private:
    /// Asks Triton which requests were cancelled, as long as there are any: it does not tell by itself.
    void watch();

    Settings settings_;
    const std::shared_ptr<const Families> families_;
    const std::shared_ptr<Served> served_;
    Metric in_flight_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::set<Request *> asked_;
    /// Requests that Triton has not got back.
    std::size_t open_ = 0;
    bool ends_ = false;
    std::thread watcher_;
};

#endif
