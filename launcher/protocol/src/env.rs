//! Every environment variable that Phalanx reads or sets, in one place.

/// Folder that holds runs by name; `runs` in the working directory where unset.
pub const RUNS: &str = "PHALANX_RUNS";
/// Path of the trainer's binary; beside the launcher's own where unset.
pub const TRAINER: &str = "PHALANX_TRAINER";
/// Folder of the libtorch to run with (the one that holds `lib/`); found by itself where unset.
pub const LIBTORCH: &str = "PHALANX_LIBTORCH";
/// The NCCL library, or its folder, in place of libtorch's.
pub const NCCL: &str = "PHALANX_NCCL";
/// `off`: a GPU computes with libtorch's operators alone, and without kernels of our own.
pub const KERNELS: &str = "PHALANX_KERNELS";
/// Where programs keep what they can make again; `.cache` in [`HOME`] where unset. Compiled kernels
/// are in `phalanx/kernels` there.
pub const CACHE_HOME: &str = "XDG_CACHE_HOME";
/// The user's own folder.
pub const HOME: &str = "HOME";
/// NCCL's own switch: several ranks on one GPU, for tests (NCCL 2.30 and later).
pub const SHARE_GPUS: &str = "NCCL_MULTI_RANK_GPU_ENABLE";
/// Hardware queues of a GPU. A collective that waits for its peers must not hold up another that
/// shares its queue; CUDA's own number is 8, its limit 32.
pub const CUDA_QUEUES: (&str, &str) = ("CUDA_DEVICE_MAX_CONNECTIONS", "32");
/// CUDA's own list of the GPUs that a process may use; all where unset.
pub const CUDA_VISIBLE: &str = "CUDA_VISIBLE_DEVICES";
/// libtorch's own settings of the allocator of GPU memory, by either name; where one is set,
/// `cluster.expandable_segments` does nothing.
pub const ALLOCATOR: [&str; 2] = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"];
/// The name by which etcd knows a coordinator and its agents (`restart.store`); none where unset.
pub const ETCD_USER: &str = "PHALANX_ETCD_USER";
/// Its password.
pub const ETCD_PASSWORD: &str = "PHALANX_ETCD_PASSWORD";
/// In place of it, the file that holds the password.
pub const ETCD_PASSWORD_FILE: &str = "PHALANX_ETCD_PASSWORD_FILE";
/// PEM file of the authorities that etcd's certificate is from (`etcds://`).
pub const ETCD_CA: &str = "PHALANX_ETCD_CA";
/// PEM file of a client's certificate, where etcd asks for one.
pub const ETCD_CERT: &str = "PHALANX_ETCD_CERT";
/// PEM file of its key.
pub const ETCD_KEY: &str = "PHALANX_ETCD_KEY";
/// What ranks have no business with, and are not handed on.
pub const SECRETS: [&str; 2] = [ETCD_PASSWORD, ETCD_PASSWORD_FILE];
/// Filter of log lines, as `tracing-subscriber`'s `EnvFilter` reads it; `info` where unset.
pub const LOG: &str = "PHALANX_LOG";
/// Folder of reference cases that the parity tests take besides their own.
pub const REFERENCES: &str = "PHALANX_REFERENCES";
/// Set for a rank: where its control socket is: [`CONTROL_STDIN`], or under `mpirun`
/// [`CONTROL_NAMED`] and the name of the socket at which the launcher listens.
pub const CONTROL: &str = "PHALANX_CONTROL";
/// Set for a rank, for people who look at a process list: its rank.
pub const RANK: &str = "PHALANX_RANK";

/// Set for a trainer that gets its place later: `LOCAL_RANK:RUN_DIRECTORY`, for which it makes
/// ready what it can meanwhile.
pub const WARM: &str = "PHALANX_WARM";

/// A value of [`CONTROL`]: the control socket is the rank's standard input.
pub const CONTROL_STDIN: &str = "stdin";
/// The beginning of the other value of [`CONTROL`]: the name of an abstract Unix socket follows.
pub const CONTROL_NAMED: &str = "@";
/// Set by Open MPI's `mpirun`: the rank.
pub const MPI_RANK: &str = "OMPI_COMM_WORLD_RANK";

/// Set by Slurm for each task of a step: its number in the step.
pub const SLURM_TASK: &str = "SLURM_PROCID";
/// Set by Slurm: the number of the task on its node.
pub const SLURM_LOCAL_TASK: &str = "SLURM_LOCALID";
/// Set by Slurm: the node's number in the job, in the infrastructure's order.
pub const SLURM_NODE: &str = "SLURM_NODEID";
/// Set by Slurm: the node's name.
pub const SLURM_NODE_NAME: &str = "SLURMD_NODENAME";
/// Set by `srun`: the tasks of the step.
pub const SLURM_NUM_TASKS: &str = "SLURM_STEP_NUM_TASKS";

/// Where the dynamic linker looks for libtorch; set for a rank.
pub const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";
/// Set for a rank to its number of threads, so that no math library starts one per core.
pub const THREADS: [&str; 4] =
    ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"];
