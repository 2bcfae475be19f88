; Runs a TVM parallel loop on the OpenMP threads that torch already has. codegen/omp.py connects it; no C compiler is involved.
;
;   launch(task, data, asked): asked == 0 means "as many tasks as torch.set_num_threads allows". One task runs on the caller, without
;   OpenMP. Otherwise one parallel region of the whole team (a smaller one would make libgomp end threads and start them again at
;   torch's next call), in which thread t runs the tasks t, t + team, t + 2 team ...

%group = type { ptr, i32 }                      ; TVMParallelGroupEnv: sync handle, number of tasks
%job = type { ptr, ptr, ptr, i32, i32 }         ; task, group, data, number of tasks, status

@parallel = internal global ptr null            ; GOMP_parallel(function, data, threads, flags)
@thread = internal global ptr null              ; omp_get_thread_num()
@team = internal global ptr null                ; omp_get_num_threads()
@limit = internal global ptr null               ; omp_get_max_threads()

define internal void @share(ptr %job) {
entry:
  %task.at = getelementptr %job, ptr %job, i32 0, i32 0
  %group.at = getelementptr %job, ptr %job, i32 0, i32 1
  %data.at = getelementptr %job, ptr %job, i32 0, i32 2
  %tasks.at = getelementptr %job, ptr %job, i32 0, i32 3
  %status.at = getelementptr %job, ptr %job, i32 0, i32 4
  %task = load ptr, ptr %task.at
  %group = load ptr, ptr %group.at
  %data = load ptr, ptr %data.at
  %tasks = load i32, ptr %tasks.at
  %get.thread = load ptr, ptr @thread
  %get.team = load ptr, ptr @team
  %me = call i32 %get.thread()
  %step = call i32 %get.team()
  br label %next
next:
  %i = phi i32 [ %me, %entry ], [ %after, %ran ]
  %more = icmp slt i32 %i, %tasks
  br i1 %more, label %run, label %done
run:
  %code = call i32 %task(i32 %i, ptr %group, ptr %data)
  %failed = icmp ne i32 %code, 0
  br i1 %failed, label %fail, label %ran
fail:
  store atomic i32 %code, ptr %status.at monotonic, align 4
  br label %ran
ran:
  %after = add i32 %i, %step
  br label %next
done:
  ret void
}

define internal i32 @launch(ptr %task, ptr %data, i32 %asked) {
entry:
  %group = alloca %group
  %job = alloca %job
  %get.limit = load ptr, ptr @limit
  %threads = call i32 %get.limit()
  %any = icmp eq i32 %asked, 0
  %tasks = select i1 %any, i32 %threads, i32 %asked
  %group.tasks = getelementptr %group, ptr %group, i32 0, i32 1
  store ptr null, ptr %group
  store i32 %tasks, ptr %group.tasks
  %one = icmp eq i32 %tasks, 1
  br i1 %one, label %alone, label %together
alone:
  %code = call i32 %task(i32 0, ptr %group, ptr %data)
  ret i32 %code
together:
  %group.at = getelementptr %job, ptr %job, i32 0, i32 1
  %data.at = getelementptr %job, ptr %job, i32 0, i32 2
  %tasks.at = getelementptr %job, ptr %job, i32 0, i32 3
  %status.at = getelementptr %job, ptr %job, i32 0, i32 4
  store ptr %task, ptr %job
  store ptr %group, ptr %group.at
  store ptr %data, ptr %data.at
  store i32 %tasks, ptr %tasks.at
  store i32 0, ptr %status.at
  %run = load ptr, ptr @parallel
  call void %run(ptr @share, ptr %job, i32 %threads, i32 0)
  %status = load i32, ptr %status.at
  ret i32 %status
}

; main(parallel, thread, team, limit) -> address of launch, in TVM's calling convention: an argument or result is a 16-byte cell that
; holds its type (1: integer) and, 8 bytes on, its value.
define i32 @__tvm_ffi_main(ptr %self, ptr %arguments, i32 %count, ptr %result) {
  %1 = getelementptr i8, ptr %arguments, i64 8
  %2 = getelementptr i8, ptr %arguments, i64 24
  %3 = getelementptr i8, ptr %arguments, i64 40
  %4 = getelementptr i8, ptr %arguments, i64 56
  %parallel = load ptr, ptr %1
  %thread = load ptr, ptr %2
  %team = load ptr, ptr %3
  %limit = load ptr, ptr %4
  store ptr %parallel, ptr @parallel
  store ptr %thread, ptr @thread
  store ptr %team, ptr @team
  store ptr %limit, ptr @limit
  %value = getelementptr i8, ptr %result, i64 8
  %address = ptrtoint ptr @launch to i64
  store i64 1, ptr %result
  store i64 %address, ptr %value
  ret i32 0
}
