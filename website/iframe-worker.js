// The search of mkdocs-material runs in a Worker, which browsers refuse to a page that was opened
// from disk. This one runs the same script in a hidden frame instead, and only there.
// The theme would fetch such a file from a server on each page; its name keeps it from doing so.
class FrameWorker extends EventTarget {
  constructor(url) {
    super()
    this.frame = document.createElement("iframe")
    this.frame.hidden = true
    this.frame.srcdoc = "<!doctype html><title>search</title>"
    this.ready = new Promise((resolve, reject) => {
      this.frame.onload = () => {
        const inside = this.frame.contentWindow
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
        const script = inside.document.createElement("script")
        script.onload = () => resolve(inside)
        script.onerror = () => reject(new Error(`cannot load ${url}`))
        script.src = url
        inside.document.head.append(script)
      }
    })
    document.body.append(this.frame)
  }

  postMessage(data) {
    this.ready.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })))
  }

  terminate() {
    this.frame.remove()
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker
