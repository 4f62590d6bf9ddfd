// Runs the tasks of an attention pass on the threads asked for. Only for *_cpu.cpp files.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cross_modal_attention/cross_modal_attention.h"

namespace m4k::M4K_SIMD_NS {

// One task is one (sample, key-value head), the samples with the most work first. Tasks write to disjoint places, so
// the schedule cannot change a result.
template <typename Task, typename Args>
static void run_tasks(const AttentionPlan& plan, const Args& args) {
    const AttentionWorkspace size(plan.longest_k, plan.k_groups, args.shape.head_dim);
    const int heads = args.shape.kv_heads;
    const int64_t tasks = plan.batch * heads;
    // A thread takes neighbouring heads of a sample together, since it fetches the next head's rows while it works on
    // one; but no more than leaves 16 helpings for every thread to even out their lengths.
    const int64_t fair = tasks / (16 * args.shape.threads);
    const int chunk = static_cast<int>(fair < 1 ? 1 : (fair < heads ? fair : heads));
#pragma omp parallel num_threads(args.shape.threads) if (args.shape.threads > 1)
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num();
#else
        const int thread = 0;
#endif
        const Task task(plan, args, size, args.workspace + thread * args.workspace_step);
#pragma omp for schedule(dynamic, chunk)
        for (int64_t t = 0; t < tasks; ++t) task.run(plan.order[t / heads], static_cast<int>(t % heads));
    }
}

}  // namespace m4k::M4K_SIMD_NS
