import sys; sys.path.insert(0,'.')
from benchmarks.compiled import compile_kernel
from titans_pretrain.kernels.memory_scan.triton.tables_back import tables_back_kernel as k
f="*fp32"
for BT in (16,32,64):
  for w in (1,2,4,8):
    a=dict(forget=f,momentum=f,lr=f,G=f,read=f,d_G=f,d_read=f,d_last=f,d_carry=f,d_forget=f,d_momentum=f,d_lr=f,first="i32",tiles="i32",offset="i32",tokens="i32",heads="i32",GATES=1,DEPTH=2,SLICES=4,BT=BT)
    print(BT,w,compile_kernel(k,a,w,1,90))
