import sys,time
import numpy as np, keras
import keras_woodfisher as kw
S="/work/shared/"
model=keras.models.load_model(S+"models/resnet20_cifar10.keras",compile=False)
tr=np.load(S+"data/cifar10_train12k.npz"); va=np.load(S+"data/cifar10_val5k.npz")
vx,vy=va["x"].astype("float32"),va["y"].ravel()
dense=model.get_weights()
x=tr["x"].astype("float32")
def acc(x,y): return 100*float((model.predict(x,batch_size=500,verbose=0).argmax(1)==y).mean())
kwargs=eval("dict(%s)"%sys.argv[2]) if len(sys.argv)>2 else {}
for s in map(float,sys.argv[1].split(",")):
    model.set_weights(dense)
    t0=time.perf_counter(); c0=time.process_time()
    r=kw.prune(model,x,s,verbose=0,**kwargs)
    w,c=time.perf_counter()-t0,time.process_time()-c0
    print(s,"wall",round(w,2),"cpu",round(c,2),round(acc(vx,vy),2),r.sparsity,[(p.name,round(p.seconds,2),p.peak_bytes>>20) for p in r.phases],r.reconstruction.error,r.reconstruction.compared,flush=True)
    if "-v" in sys.argv: print(r)
