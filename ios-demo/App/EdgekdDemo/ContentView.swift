import SwiftUI
import UniformTypeIdentifiers

/// One screen: a model is chosen; then it chats, or is timed.
struct ContentView: View {
    @StateObject private var model = ChatModel()
    @State private var message = ""
    @State private var isChoosing = false

    var body: some View {
        VStack(alignment: .leading, spacing: 12) {
            HStack {
                Button("Choose a model") { isChoosing = true }
                    .disabled(model.isBusy)
                Spacer()
                Button(model.isLoaded ? "Measure" : "Load again") { model.isLoaded ? model.measure() : model.start() }
                    .disabled(model.isBusy)
            }
            Text(model.status)
                .font(.footnote)
            ScrollView {
                Text(model.chat)
                    .textSelection(.enabled)
                    .frame(maxWidth: .infinity, alignment: .leading)
            }
            HStack {
                TextField("Message", text: $message, axis: .vertical)
                Button("Send") { send() }
                    .disabled(model.isBusy || !model.isLoaded || message.isEmpty)
                Button("Stop") { model.stop() }
                    .disabled(!model.isBusy)
            }
        }
        .padding()
        .fileImporter(isPresented: $isChoosing, allowedContentTypes: [.folder]) { result in
            if let folder = try? result.get() { model.take(folder) }
        }
        .task { model.start() }
    }

    private func send() {
        model.answer(message)
        message = ""
    }
}
